"""The task `classify`: images and labels in, the best labels of each image out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract import rows
from radapter_serve.contract.embeddings import DEFAULT_POINT, Point
from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    NOT_CALIBRATED,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.contract.images import ImageFile, read_header
from radapter_serve.contract.labels import class_probabilities, known_as
from radapter_serve.encoders.labels import MAX_EXAMPLES, Examples, LabelSet
from radapter_serve.encoders.loaded import CHUNK, LoadedRelease, Place, TaskSteps
from radapter_serve.release.release import HOW_TO_CALIBRATE, WHY_NO_TEMPERATURE, Confidence
from radapter_serve.tasks.embed import (
    Labels,
    checked_headers,
    checked_labels,
    finite,
)

DEFAULT_TOP_K = 5
DEFAULT_THRESHOLD = 0.5
UNKNOWN = "unknown"
_BY_EXAMPLE = (
    "scores are not calibrated for labels by example; leave multi_label, calibrated and unknown out"
)


@dataclass(frozen=True)
class ClassifyRequest:
    """Image files to classify with the same labels; values are checked on creation."""

    images: Sequence[bytes | ImageFile]
    labels: Labels
    top_k: int | None = None  # None: 5, and all with `multi_label`
    point: Point | Place = DEFAULT_POINT
    multi_label: bool = False  # score each label by itself: any number may be right
    threshold: float | None = None  # with multi_label, the least score to return; None: 0.5
    calibrated: bool = False  # scores calibrated on the release's validation data
    unknown: float | None = None  # an image is unknown if its best label's own score is less
    examples: Examples | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise invalid(f"top_k is {self.top_k}; allowed: whole numbers from 1")
        for name, value in (("threshold", self.threshold), ("unknown", self.unknown)):
            if value is not None and not 0 <= value <= 1:
                raise invalid(f"{name} is {value:g}; allowed: numbers from 0 to 1")
        if self.threshold is not None and not self.multi_label:
            raise invalid("threshold leaves out labels that are scored alone; send multi_label too")
        if self.unknown is not None and self.multi_label:
            raise invalid("unknown does not go with multi_label, whose threshold says the same")
        examples = self.examples
        if examples is None:
            return
        images = examples.images
        if not images:
            raise invalid("no examples; give at least one, or leave example_labels out")
        if len(images) != len(examples.labels):
            raise invalid(
                f"{len(images)} examples and {len(examples.labels)} example_labels; each example"
                " has one"
            )
        if len(set(images)) > MAX_EXAMPLES:
            raise invalid(
                f"{len(set(images))} examples in a request; at most {MAX_EXAMPLES} are allowed"
            )
        weights = examples.weights
        wrong = [weight for weight in weights or () if not 0 <= weight <= 1]
        if wrong or weights == ():
            shown = f"{wrong[0]:g}" if wrong else "empty"
            raise invalid(
                f"example_weight is {shown}; numbers from 0 (only the text) to 1 (only the"
                " examples) are allowed, one for all labels or one for each"
            )


@dataclass(frozen=True)
class Ranking:
    """The labels of an image, the best first, and their scores, float32; may be empty."""

    labels: Sequence[str]
    scores: NDArray[np.float32]


def classify(
    loaded: LoadedRelease, request: ClassifyRequest, cancelled: Cancelled | None = None
) -> TaskSteps[list[Ranking]]:
    """Rank labels for each image by cosine; refuses a wrong request before encoding an image."""
    # Check values and headers, before anything is encoded.
    place = loaded.place(request.point)
    rule = _score_rule(loaded, request, place)
    asked = checked_labels(loaded, request.labels, place, by_example=True)
    count = len(asked.lines)
    examples = request.examples
    shown: list[ImageFile] = []
    if examples is not None:
        for number in examples.labels:
            if not 0 <= number < count:
                raise invalid(f"example_labels has {number}; there are labels 0 to {count - 1}")
        if examples.weights is not None and len(examples.weights) not in (1, count):
            raise invalid(
                f"example_weight has {len(examples.weights)} numbers for {count} labels; give one"
                " for all, or one for each"
            )
        for image in dict.fromkeys(examples.images):
            with _example(examples, image):
                shown.append(read_header(image))
    files = checked_headers(loaded, request.images, shown)

    # Embed the labels, and move those that have examples.
    label_set = yield from asked.embed(cancelled)
    for shown_by in (label_set.examples, examples):
        if shown_by is not None:
            label_set = yield from with_rows(loaded, label_set, shown_by, place, cancelled)

    # Embed the images, and rank the labels of each.
    pixels = yield from loaded.decoded(files, cancelled)
    embeds = yield from loaded.encoded("images", pixels, place, cancelled)
    return [rule.ranking(cosines, label_set) for cosines in finite(embeds) @ label_set.embeds.T]


@dataclass(frozen=True)
class ScoreRule:
    """A rule to score labels; `scale` and `bias` are those of `class_probabilities`."""

    top_k: int | None  # None: all
    scale: float
    bias: float | None
    threshold: float | None = None  # score below which labels are left out
    unknown: float | None = None  # as in `ClassifyRequest`
    sigmoid: tuple[float, float] = (1.0, 0.0)  # scale and bias of a label's own score

    def ranking(self, cosines: NDArray[np.float32], label_set: LabelSet) -> Ranking:
        """Rank the labels of an image by its cosines with them, float32 [C]."""
        if self.unknown is not None:
            best = class_probabilities(cosines.max(keepdims=True), *self.sigmoid)[0]
            if best < self.unknown:
                return Ranking([UNKNOWN], np.array([1 - best], np.float32))
        count = len(cosines) if self.top_k is None else min(self.top_k, len(cosines))
        # By cosines: in float32, a sigmoid is the same for all logits above 17.
        least = np.partition(cosines, -count)[-count]
        places = np.flatnonzero(cosines >= least)
        places = places[np.argsort(-cosines[places], kind="stable")][:count]
        scores = class_probabilities(cosines, self.scale, self.bias)[places]
        if self.threshold is not None:
            enough = scores >= self.threshold
            places = places[enough]
            scores = scores[enough]
        return Ranking([label_set.labels[place] for place in places], scores)


def _score_rule(loaded: LoadedRelease, request: ClassifyRequest, place: Place) -> ScoreRule:
    """The rule of a request; refuses scores that the release, or labels with examples, lack."""
    release = loaded.release
    is_fitted = request.multi_label or request.calibrated or request.unknown is not None
    confidence: Confidence | None = None
    sigmoid = 1.0, 0.0
    if is_fitted:
        name = request.labels.label_set
        by_example = name is not None and known_as(name, release.sets_by_example) is not None
        if request.examples is not None or by_example:
            raise TaskError(NOT_CALIBRATED, _BY_EXAMPLE)
        confidence = loaded.confidence(place)
        sigmoid = confidence.scale, confidence.bias
    if request.multi_label:
        # Use the fitted scale and bias even for a model that was pretrained with a sigmoid:
        # training moves the cosines, but keeps the scale and the bias of the base.
        threshold = DEFAULT_THRESHOLD if request.threshold is None else request.threshold
        return ScoreRule(request.top_k, *sigmoid, threshold)
    scale = release.logit_scale
    bias = release.logit_bias
    if confidence is not None and request.calibrated:
        if bias is not None:
            scale, bias = sigmoid
        elif confidence.temperature is None:
            why = f"in its validation data {WHY_NO_TEMPERATURE}"
            raise TaskError(
                NOT_CALIBRATED, f"this release has no temperature: {why}; {HOW_TO_CALIBRATE}"
            )
        else:
            scale = release.logit_scale / confidence.temperature
    top_k = DEFAULT_TOP_K if request.top_k is None else request.top_k
    return ScoreRule(top_k, scale, bias, unknown=request.unknown, sigmoid=sigmoid)


@contextlib.contextmanager
def _example(examples: Examples, image: bytes) -> Iterator[None]:
    """Make an error name the example, so that it is not taken for an image to classify."""
    try:
        yield
    except TaskError as error:
        if error.code not in (INVALID_IMAGE, IMAGE_TOO_LARGE):
            raise
        place = examples.images.index(image) + 1
        message = f"example {place} of {len(examples.images)}: {error.message}"
        raise invalid(message) from None


def with_rows(
    loaded: LoadedRelease,
    label_set: LabelSet,
    examples: Examples,
    place: Place,
    cancelled: Cancelled | None = None,
) -> TaskSteps[LabelSet]:
    """Move labels towards what sets their examples apart, as radapter_serve/contract/rows.py says:
    as far as the examples' weights say, or as leaving each example out does.
    """
    # Embed each example that is not cached, in parts, between which other callers have a turn.
    cache = loaded.label_cache
    alpha = place.encoder_alpha
    digests = dict(zip(examples.images, examples.digests, strict=True))
    embeds = {image: cache.get((digest, alpha)) for image, digest in digests.items()}
    new = [image for image, kept in embeds.items() if kept is None]
    size = min(CHUNK, loaded.release.max_batch_size)
    for start in range(0, len(new), size):
        part = new[start : start + size]
        decoded = []
        for image in part:
            with _example(examples, image):
                decoded.append((yield from loaded.decoded([read_header(image)], cancelled)))
        encoded = yield from loaded.encoded("images", np.concatenate(decoded), place, cancelled)
        for image, row in zip(part, finite(encoded), strict=True):
            embeds[image] = row.copy()
            cache.put((digests[image], alpha), embeds[image])

    # Move the labels. An example that is given twice for a label counts once.
    pairs = list(zip(examples.images, examples.labels, strict=True))
    if not examples.of_means:
        pairs = list(dict.fromkeys(pairs))
    photos = np.stack([embeds[image] for image, _ in pairs])
    labels = np.array([label for _, label in pairs])
    texts = label_set.embeds
    totals = rows.sums_of(photos, labels, len(texts))
    b: float | Sequence[float]
    if examples.weights is None:
        b = rows.choose_b(texts, photos, labels, totals=totals).b
    else:
        b = [rows.b_of(weight) for weight in examples.weights]
    if examples.of_means:
        sums, _ = totals
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        towards = sums / np.maximum(lengths, 1e-12)
    else:
        towards = rows.directions(*totals)
    return replace(label_set, embeds=rows.moved(texts, towards, b))
