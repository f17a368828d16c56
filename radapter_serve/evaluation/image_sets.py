"""Data sets of an evaluation, one class per task: they query models and measure their answers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import open_clip
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.images import decode
from radapter_serve.contract.labels import class_probabilities, indistinguishable, split_label
from radapter_serve.contract.preprocess import decode_pixels
from radapter_serve.data.masks import IGNORE, MaskedImage
from radapter_serve.data.proposals import Proposals
from radapter_serve.data.rows import ImageColumn
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import (
    Interval,
    average_precisions,
    calibration_error,
    caption_groups,
    check_finite,
    class_ious,
    classification_metrics,
    confusion,
    mean_recall_interval,
    pixel_sums,
    precision_interval,
    recalls_of,
    retrieval_ranks,
    segmentation_intervals,
    segmentation_metrics,
    shares,
    true_ranks,
    wilson,
)
from radapter_serve.evaluation.models import Candidate, SegmentQuery
from radapter_serve.evaluation.rows import ClassFigures, Row, packed
from radapter_serve.evaluation.suite import PROPOSALS, SEVERAL_METRIC, Entry
from radapter_serve.files import digest_of
from radapter_serve.tasks.dense import SegmentOptions
from radapter_serve.tasks.segment import BINARY, PROPOSAL_WEIGHT

MOST_CONFUSED = 50  # most classes of a confusion matrix in a row and in a plot
NOUN_TEMPLATES = ("a photo of a {}.",)
_NOUN_STEP = 3  # every third of ImageNet's 1,000 names: 333 nouns
_WORD = re.compile(r"[^\W_]+")
_DIGEST_THREADS = 8
Answers = dict[str, NDArray[Any]]  # arrays by name, with a row for each image or batch


@dataclass(frozen=True)
class EvaluationSet(ABC):
    """A data set, opened according to the entry of a suite; its images are not decoded yet."""

    entry: Entry
    images: Sequence[Any]

    task: ClassVar[str]  # its name in CLIP_benchmark
    most: ClassVar[int | None] = None  # most images in memory at once; None: no limit

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nouns(self) -> Sequence[str]:
        """Common nouns other than the set's classes, to measure `kept`; only for classification."""
        return ()

    @cached_property
    def contents(self) -> list[str]:
        """A digest of each image, with its masks if it has any."""

        def digest_of_image(image: Any) -> str:
            sha = hashlib.sha256()
            for part in self.parts(image):
                if not isinstance(part, bytes):
                    part = f"{part.dtype}{part.shape}".encode() + part.tobytes()
                sha.update(part)
            return sha.hexdigest()

        try:
            with ThreadPoolExecutor(_DIGEST_THREADS, thread_name_prefix="digest") as pool:
                return list(pool.map(digest_of_image, self.images))
        except RAdapterError as error:
            raise RAdapterError(f"data set {self.entry.name!r}: {error}") from error

    @cached_property
    def set_digest(self) -> str:
        """A digest of the truth and the images, on which the metrics depend."""
        return digest(*self.truth, self.contents)

    def parts(self, image: Any) -> Iterable[bytes | NDArray[Any]]:
        """Yield the files and arrays of an image, for its digest."""
        yield image.data()

    @property
    @abstractmethod
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """The classes or captions, and the labels or images that belong to them, for the digest."""

    @abstractmethod
    def fields(self, model: Candidate) -> dict[str, Any]:
        """Fields of `Row` about the set and the way a model is evaluated on it."""

    def prepare(self, model: Candidate, number: int) -> Any:
        """Read and decode an image without its border; thread-safe. The suite says whether it is
        turned according to EXIF.
        """
        data = self.images[number].data()
        border = self.entry.border
        is_turned = self.entry.exif_orientation
        preprocess = replace(model.loaded.preprocess, exif_orientation=is_turned)
        if not border:
            return decode_pixels(data, preprocess)
        image = decode(data, exif_orientation=is_turned)
        most = (min(image.size) - 1) // 2
        if border > most:
            raise RAdapterError(
                f"border is {border}, which leaves nothing of {image.width} x {image.height}"
                f" pixels; allowed: 0 to {most}"
            )
        return preprocess(image.crop((border, border, image.width - border, image.height - border)))

    @abstractmethod
    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        """Compute a model's answers for prepared images, the first of which has number `start`. In
        classification, `keep` adds "nouns", the best of `nouns`, and "scores", cosines [N, C].
        """

    @abstractmethod
    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        """Compute the measured fields of `Row` from the answers for all images, in order."""

    def row(self, model: Candidate) -> Row:
        """A model's row without metrics; an error if the model lacks the set's dense method."""
        entry = self.entry
        return Row(
            **model.facts,
            **self.fields(model),
            n=len(self),
            set_digest=self.set_digest,
            dataset=entry.name,
            task=self.task,
            source=model.source,
            alpha=model.alpha,
            shift=entry.shift,
            split=entry.split,
            metric=entry.metric,
            border=entry.border,
            exif_orientation=entry.exif_orientation,
            metrics={},
            runtime=0.0,
        )


@dataclass(frozen=True)
class ImageOfRow:
    """The image file of a row of a data set."""

    column: ImageColumn
    rows: Any
    index: int

    def data(self) -> bytes:
        """Read the image file."""
        return self.column.data(self.rows[self.index])

    @property
    def name(self) -> str:
        """The image's name in error messages."""
        return self.column.name(self.rows[self.index])


@dataclass(frozen=True)
class ClassificationSet(EvaluationSet):
    """Images with exactly one label each, or with one or more."""

    labels: NDArray[Any]  # integer [N]; bool [N, C] where images may have several
    classes: list[str]  # with synonyms after commas
    templates: list[str] | None  # prompt templates; None takes the model's

    task = "zeroshot_classification"

    @property
    def several(self) -> bool:
        """True if an image may have several labels."""
        return self.labels.ndim == 2

    @property
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        if self.several:
            return self.classes, [np.flatnonzero(row).tolist() for row in self.labels]
        return self.classes, self.labels.tolist()

    @cached_property
    def nouns(self) -> list[str]:
        """Common nouns that don't overlap with the classes or their synonyms."""
        lines = dict.fromkeys(self.classes)
        return common_nouns([name for line in lines for name in split_label(line)])

    def prompts(self, model: Candidate) -> Sequence[str]:
        """The prompt templates for a model."""
        return self.templates or model.loaded.release.templates

    def fields(self, model: Candidate) -> dict[str, Any]:
        split = self.entry.class_split
        return {
            "classes": len(self.classes),
            "class_split": None if split == "all" else split,
            "templates": tuple(self.prompts(model)),
        }

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        embeds = model.embed_images(items)
        scores = check_finite(embeds @ model.embed_classes(self.classes, self.prompts(model)).T)
        answers: Answers = {}
        if "nouns" in keep:
            nouns = model.embed_classes(self.nouns, NOUN_TEMPLATES)
            answers["nouns"] = (embeds @ nouns.T).argmax(axis=1)
        if "scores" in keep or self.several:
            answers["scores"] = scores
        if self.several:
            return answers
        ranks = true_ranks(scores, self.labels[start : start + len(scores)])
        best = scores.argmax(axis=1)
        release = model.loaded.release
        probabilities = class_probabilities(scores, release.logit_scale, release.logit_bias)
        confidences = np.take_along_axis(probabilities, best[:, None], axis=1)[:, 0]
        return {**answers, "ranks": ranks, "best": best, "confidences": confidences}

    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        embeds = model.embed_classes(self.classes, self.prompts(model))
        alike = indistinguishable(first_names(self.classes), embeds) or None
        count = len(self.classes)
        intervals: dict[str, Interval]
        if self.several:
            scores = answers["scores"]
            precisions = average_precisions(scores, self.labels)
            right = np.take_along_axis(self.labels, scores.argmax(axis=1)[:, None], axis=1)
            metrics = {SEVERAL_METRIC: float(np.nanmean(precisions)), "acc1": float(right.mean())}
            intervals = {"acc1": wilson(metrics["acc1"], len(scores))}
            if (interval := precision_interval(scores, self.labels)) is not None:
                intervals[SEVERAL_METRIC] = interval
            n = self.labels.sum(axis=0)
            return {
                "metrics": metrics,
                "intervals": intervals,
                "per_class": by_class(self.classes, n, average_precision=precisions),
                "indistinguishable": alike,
            }
        ranks = answers["ranks"]
        metrics = classification_metrics(ranks, self.labels, count)
        metrics["ece"] = calibration_error(answers["confidences"], ranks < 1)
        n = np.bincount(self.labels, minlength=count)
        hits = np.bincount(self.labels[ranks < 1], minlength=count)
        intervals = {
            name: wilson(metrics[name], len(ranks)) for name in ("acc1", "acc5") if name in metrics
        }
        intervals["mean_per_class_recall"] = mean_recall_interval(hits[n > 0], n[n > 0])
        confusions = None
        if count <= MOST_CONFUSED:
            confusions = confusion(self.labels, answers["best"], count).tolist()
        k = {"acc1": 1, "acc5": 5}.get(self.entry.metric)
        return {
            "metrics": metrics,
            "intervals": intervals,
            "per_class": by_class(self.classes, n, recall=shares(hits, n)),
            "confusion": confusions,
            "indistinguishable": alike,
            "right": packed(ranks < k) if k else None,
        }


@dataclass(frozen=True)
class RetrievalSet(EvaluationSet):
    """Images and their captions."""

    captions: list[str]  # of all images
    image_of: NDArray[np.int64]  # number of each caption's image, [T]

    task = "zeroshot_retrieval"

    @property
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.captions, self.image_of.tolist()

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """Group number of each caption, [T]; equal captions match each other's images."""
        return caption_groups(self.captions)

    def fields(self, model: Candidate) -> dict[str, Any]:
        count = len(self.captions)
        different = len(set(self.groups.tolist()))
        return {"captions": count, "different_captions": different if different < count else None}

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        return {"images": model.embed_images(items)}

    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        images = answers["images"]
        texts = model.embed_texts(self.captions)
        ranks = retrieval_ranks(images, texts, self.image_of, self.groups)
        metrics = recalls_of(ranks)
        # Captions of one image are not independent, so n is the number of images both ways.
        intervals = {name: wilson(share, len(images)) for name, share in metrics.items()}
        way, _, recall = self.entry.metric.partition("_retrieval_recall@")
        hits = ranks[way] < int(recall)
        right: str | list[int] = packed(hits)
        if way == "image":
            right = np.bincount(self.image_of[hits], minlength=len(images)).tolist()
        return {"metrics": metrics, "intervals": intervals, "right": right}


@dataclass(frozen=True)
class MaskedItem:
    """An image, the class of each pixel, and masks for the model to classify."""

    image: Image.Image
    truth: NDArray[np.int32]  # class of each pixel, or IGNORE, [H, W]
    # Masks of a proposal network or of the true segments, 0 to 255, [N, H, W].
    masks: NDArray[np.uint8] | None = None
    # The network's probabilities of the labels, [N, C], if it has any.
    scores: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SegmentationSet(EvaluationSet):
    """Images with masks."""

    images: Sequence[MaskedImage]
    classes: list[str]  # by their number in the masks, with synonyms after commas
    templates: list[str] | None  # prompt templates; None takes the model's
    proposals: Proposals | None = None  # masks of a network, instead of the true segments

    task = "zeroshot_segmentation"
    most = 4  # masks take much memory

    def __post_init__(self) -> None:
        names = first_names(self.classes)
        if self.entry.background not in (None, *names):
            raise RAdapterError(
                f"data set {self.entry.name!r}: background is {self.entry.background!r}, not one of"
                f" the classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )

    @property
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.classes, [image.name for image in self.images]

    def parts(self, image: MaskedImage) -> Iterator[bytes | NDArray[Any]]:
        yield image.data()
        yield image.mask()
        if self.proposals is not None:
            yield self.proposals.raw(image.name)
        elif self.entry.dense == PROPOSALS:
            for label, mask in image.segments():
                yield str(label).encode()
                yield mask

    @cached_property
    def background(self) -> int | None:
        """Number of the background class, which has no prompt; None without such a class."""
        if self.entry.background is None:
            return None
        return first_names(self.classes).index(self.entry.background)

    def query(self, model: Candidate) -> SegmentQuery:
        """Labels, templates and options of the segmentation; defaults are filled in."""
        entry = self.entry
        dense = model.dense_method(entry.dense)
        if dense == PROPOSALS:
            weight = PROPOSAL_WEIGHT if entry.proposal_weight is None else entry.proposal_weight
            options = SegmentOptions(refine=0, threshold=entry.threshold, proposal_weight=weight)
        else:
            options = SegmentOptions(
                *(entry.short_side, entry.stride, entry.refine, entry.threshold),
                proposal_weight=PROPOSAL_WEIGHT,
            )
            short_side, stride = options.sizes(model.loaded.preprocess.size[0])
            options = replace(options, short_side=short_side, stride=stride)
        labels = [line for number, line in enumerate(self.classes) if number != self.background]
        templates = list(self.templates or model.loaded.release.templates)
        return SegmentQuery(labels, templates, dense, options)

    def fields(self, model: Candidate) -> dict[str, Any]:
        query = self.query(model)
        options = query.options
        crop = None
        if query.dense == PROPOSALS:
            crop = model.loaded.release.crop
        scored = self.proposals is not None and self.proposals.scored
        return {
            "classes": len(self.classes),
            "classes_digest": digest(self.classes),
            "dense": query.dense,
            "size": model.loaded.preprocess.size[0],
            "short_side": options.short_side,
            "stride": options.stride,
            "refine": options.refine,
            "threshold": options.threshold,
            "background": self.entry.background,
            "crop": crop,
            "proposals": self.entry.proposals,
            "proposal_weight": options.proposal_weight if scored else None,
            "templates": tuple(query.templates),
        }

    def prepare(self, model: Candidate, number: int) -> MaskedItem:
        image = self.images[number]
        seen = decode(image.data(), exif_orientation=self.entry.exif_orientation)
        truth = image.mask()
        if self.proposals is not None:
            masks, scores = self.proposals.read(image.name, (len(truth), truth.shape[1]))
            used = masks.max(axis=(1, 2), initial=0) > BINARY  # an empty mask has no crop
            return MaskedItem(seen, truth, masks[used], None if scores is None else scores[used])
        if self.entry.dense != PROPOSALS:
            return MaskedItem(seen, truth)
        segments = [
            mask for label, mask in image.segments() if label != self.background and mask.any()
        ]
        return MaskedItem(seen, truth, np.array(segments, np.uint8) * np.uint8(255))

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        query = self.query(model)
        # Map each index of an answer to a class. Without a background class, "no label" is wrong
        # everywhere.
        count = len(self.classes)
        class_of = [number for number in range(count) if number != self.background]
        if query.dense == PROPOSALS or query.options.threshold is not None:
            class_of.append(count if self.background is None else self.background)
        classes = np.array(class_of, np.int64)

        total = np.zeros((count, count + 1), np.int64)
        sums = []  # of each image, for the bootstrap
        for number, item in enumerate(items, start):
            if item.masks is not None and not len(item.masks):
                labels = np.full(item.truth.shape, len(classes) - 1, np.int64)
            else:
                try:
                    mask = model.segment(item.image, query, item.masks, item.scores)
                except RAdapterError as error:
                    raise RAdapterError(f"{self.images[number].name}: {error}") from error
                labels = mask.astype(np.int64)
            known = item.truth != IGNORE
            counts = confusion(item.truth[known], classes[labels[known]], count)
            total += counts
            sums.append(np.stack(pixel_sums(counts)))
        return {"total": total[None], "sums": np.stack(sums)}

    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        total = answers["total"].sum(axis=0)
        right, true, answered = pixel_sums(total)
        query = self.query(model)
        embeds = model.embed_classes(query.labels, query.templates)
        alike = indistinguishable(first_names(query.labels), embeds)
        return {
            "metrics": segmentation_metrics(total),
            "intervals": segmentation_intervals(answers["sums"].swapaxes(0, 1)),
            "per_class": by_class(
                self.classes,
                true,
                recall=shares(right, true),
                iou=class_ious(right, true, answered),
            ),
            "confusion": total.tolist() if len(self.classes) <= MOST_CONFUSED else None,
            "indistinguishable": alike or None,
        }


def common_nouns(names: Iterable[str]) -> list[str]:
    """Every third of CLIP's names for ImageNet's classes, without those that overlap with these
    names: one is in the other as whole words, in any case.
    """

    def words(name: str) -> str:
        # Spaces around each word, so that only whole words match.
        return f" {' '.join(_WORD.findall(name.casefold()))} "

    classes = [name for name in map(words, names) if name.strip()]
    nouns = {name: words(name) for name in open_clip.IMAGENET_CLASSNAMES[::_NOUN_STEP]}
    return [
        name
        for name, noun in nouns.items()
        if not any(noun in label or label in noun for label in classes)
    ]


def first_names(classes: Sequence[str]) -> list[str]:
    """The first name of each class, without its synonyms, for display."""
    return [split_label(line)[0] for line in classes]


def by_class(
    classes: Sequence[str], n: NDArray[Any], **figures: NDArray[np.float64]
) -> list[ClassFigures]:
    """Build `per_class` of a row from fields of `ClassFigures`, [C] each; NaN becomes None."""
    rows = []
    for place, name in enumerate(first_names(classes)):
        values = {kind: round(float(of_class[place]), 4) for kind, of_class in figures.items()}
        known = {kind: value for kind, value in values.items() if not np.isnan(value)}
        rows.append(ClassFigures(name, int(n[place]), **known))
    return rows


def drawn(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Indices of the images to use of `count`, ascending: all, or `limit` drawn with the seed."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def digest(*parts: Sequence[Any]) -> str:
    """The `sha256:` digest of lists of texts and numbers."""
    return digest_of(json.dumps([list(part) for part in parts], ensure_ascii=False).encode())
