"""The tasks `embed_image` and `embed_text`: images or texts in, embeddings out; and the labels of a
request, a list or a label set of the release, with their embeddings.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.embeddings import DEFAULT_POINT, Point
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    NO_LABELS,
    UNKNOWN_LABEL_SET,
    Cancelled,
    TaskError,
    check_cancelled,
    invalid,
)
from radapter_serve.contract.images import ImageFile, read_headers
from radapter_serve.contract.labels import (
    check_length,
    check_names,
    check_prompts,
    known_as,
    means_of,
    prompts_of,
    split_label,
)
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import LoadedRelease, Place, TaskSteps

OTHER_POINT = "ask at the alpha of the export, or for a smaller label set"
_MAPPED = 4096  # stored prompts that are mapped at once
_PROMPTS = 256  # prompts of a part: then its labels are cached, and other callers have a turn


@dataclass(frozen=True)
class EmbedImagesRequest:
    """Image files to embed."""

    images: Sequence[bytes | ImageFile]
    point: Point | Place = DEFAULT_POINT


@dataclass(frozen=True)
class EmbedTextsRequest:
    """Non-empty texts of allowed length to embed."""

    texts: Sequence[str]
    point: Point | Place = DEFAULT_POINT

    def __post_init__(self) -> None:
        for number, text in enumerate(self.texts, 1):
            if not text.strip():
                raise invalid(
                    f"text {number} of {len(self.texts)} is empty; give at least one word"
                )
            check_length(text)


def embed_images(
    loaded: LoadedRelease, request: EmbedImagesRequest, cancelled: Cancelled | None = None
) -> TaskSteps[NDArray[np.float32]]:
    """Embed images to float32 [N, D]; a `TaskError` names the first bad image."""
    place = loaded.place(request.point)
    files = checked_headers(loaded, request.images)
    pixels = yield from loaded.decoded(files, cancelled)
    return (yield from loaded.encoded("images", pixels, place, cancelled))


def embed_texts(
    loaded: LoadedRelease, request: EmbedTextsRequest, cancelled: Cancelled | None = None
) -> TaskSteps[NDArray[np.float32]]:
    """Embed texts to float32 [N, D]; texts with too many tokens are cut as in open_clip."""
    place = loaded.place(request.point)
    rows = loaded.tokenizer.encode(request.texts)
    return (yield from loaded.encoded("tokens", rows, place, cancelled))


def checked_headers(
    loaded: LoadedRelease, images: Sequence[bytes | ImageFile], others: Sequence[ImageFile] = ()
) -> list[ImageFile]:
    """Read and check the headers of a request's images, before any image is decoded; `others` of
    the request count towards its pixels.
    """
    files = read_headers(images, others)
    for file in files:
        loaded.preprocess.check(file.width, file.height)
    return files


def finite(embeds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an encoder's embeddings; raises a `TaskError` if some are NaN or infinite."""
    if not np.isfinite(embeds).all():
        raise TaskError(
            ENCODER_FAILED, "the embeddings hold values that are not finite (NaN or infinite)"
        )
    return embeds


@dataclass(frozen=True)
class Labels:
    """The labels of a request: either a list or the name of a label set."""

    names: Sequence[str] | None = None  # synonyms may follow a name after commas
    label_set: str | None = None
    templates: Sequence[str] | None = None  # prompts of `names`; None: the release's

    def __post_init__(self) -> None:
        if self.label_set is not None and (self.names is not None or self.templates is not None):
            raise invalid("give labels (with templates, if you like) or label_set, not both")


@dataclass(frozen=True)
class AskedLabels:
    """The labels of a request as a release or its adapter knows them, with their templates."""

    loaded: LoadedRelease
    place: Place
    lines: tuple[str, ...]
    templates: tuple[str, ...]
    # The label set as it was exported; None for a list and for a label set of an adapter.
    exported: LabelSet | None = None

    @property
    def is_exported(self) -> bool:
        """True if the embeddings were exported for this place."""
        return self.exported is not None and self.place.key in (None, self.loaded.exported_alpha)

    @property
    def is_embedded(self) -> bool:
        """True if the embeddings were exported for this place, or are cached."""
        return self.is_exported or self.loaded.label_cache.get(self.key) is not None

    @property
    def key(self) -> Hashable:
        """The key of the labels' embeddings in the cache."""
        return self.lines, self.templates, self.place.key

    @property
    def stored(self) -> NDArray[np.float32] | None:
        """The prompts' embeddings that the export has stored for an adapter to map."""
        return self.loaded.stored_prompts(self.lines, self.templates, self.place)

    @property
    def counted(self) -> tuple[Sequence[str], Sequence[str]]:
        """Labels and templates as they count towards the limit of prompts: an adapter maps stored
        prompts without encoding them, so there each name counts once.
        """
        return self.lines, self.templates if self.stored is None else ("{}",)

    def embed(self, cancelled: Cancelled | None) -> TaskSteps[LabelSet]:
        """Embed the labels; examples of the label set do not move them yet."""
        exported = self.exported
        if exported is not None and self.is_exported:
            return replace(exported, examples=None)  # the export has moved them
        embedded = yield from embed_labels(
            self.loaded, self.lines, self.templates, place=self.place, cancelled=cancelled
        )
        return embedded if exported is None else replace(embedded, examples=exported.examples)


def look_up(loaded: LoadedRelease, labels: Labels, place: Place) -> AskedLabels:
    """Find the labels and templates of a request, those of its label set by the adapter or else by
    the release.
    """
    facts = None if place.adapter is None else place.adapter.facts
    if labels.names is not None:
        templates = labels.templates
        if templates is None:
            templates = (facts or loaded.release).templates
        return AskedLabels(loaded, place, tuple(labels.names), tuple(templates))

    # Look the label set up.
    name = labels.label_set or ""
    sets = {} if facts is None else facts.label_sets
    known = known_as(name, sets)
    if facts is not None and known is not None:
        return AskedLabels(loaded, place, tuple(sets[known]), tuple(facts.templates))
    known = known_as(name, loaded.label_sets)
    if known is None:
        names = ", ".join(sorted({*loaded.label_sets, *sets}))
        names = names or "none (radapter-export --label-set NAME=FILE makes one)"
        if labels.label_set is None:
            raise TaskError(NO_LABELS, f"give labels, or a label_set of this release: {names}")
        raise TaskError(
            UNKNOWN_LABEL_SET, f"no label set {name!r:.80} in this release; there are: {names}"
        )
    exported = loaded.label_sets[known]
    return AskedLabels(loaded, place, exported.lines, exported.templates, exported)


def checked_labels(
    loaded: LoadedRelease, labels: Labels, place: Place, *, by_example: bool = False
) -> AskedLabels:
    """Look up and check the labels of a request; only `classify` takes some `by_example`."""
    asked = look_up(loaded, labels, place)
    if labels.label_set is None:
        check_prompts([(asked.lines, asked.templates)])
        if not asked.is_embedded:
            check_names(asked.lines)
        return asked
    exported = asked.exported
    if exported is not None and exported.examples is not None and not by_example:
        raise invalid(
            f"the label set {labels.label_set!r:.80} has labels by example, which are for"
            " classify; give labels, or another label set"
        )
    by_examples = known_as(labels.label_set, loaded.release.sets_by_example)
    is_mixed = exported is not None and exported.examples is None and by_examples is not None
    if is_mixed and place.adapter is not None:
        raise invalid(
            f"the label set {labels.label_set!r:.80} has labels by example, which the export"
            " has joined with their texts, so no adapter moves it; leave adapter out"
        )
    if not asked.is_embedded:
        check_prompts([asked.counted], OTHER_POINT)
    return asked


def embed_prompts(
    loaded: LoadedRelease, texts: Sequence[str], place: Place, cancelled: Cancelled | None = None
) -> TaskSteps[NDArray[np.float32]]:
    """Embed prompts; for an adapter those of the base are cached, as the next one only maps."""
    if place.adapter is None:
        rows = loaded.tokenizer.encode(texts)
        return (yield from loaded.encoded("tokens", rows, place, cancelled))
    cache = loaded.prompt_cache
    base: dict[str, NDArray[np.float32]] = {}
    for text in texts:
        kept = cache.get((text, place.encoder_alpha))
        if kept is not None:
            base[text] = kept
    new = [text for text in texts if text not in base]
    if new:
        rows = loaded.tokenizer.encode(new)
        encoded = yield from loaded.encoded("tokens", rows, place.base, cancelled)
        for text, row in zip(new, encoded, strict=True):
            base[text] = row.copy()
            cache.put((text, place.encoder_alpha), base[text])
    return place.map(np.stack([base[text] for text in texts]))


def _map_means(
    place: Place, stored: NDArray[np.float32], counts: list[int], cancelled: Cancelled | None
) -> NDArray[np.float32]:
    """Map stored prompts [P, D], a part of them at a time; returns the mean of each label's, of
    which there are `counts`, scaled to unit length.
    """
    sums: list[NDArray[np.float32]] = []
    ends = np.cumsum([0, *counts])
    first = 0
    while first < len(counts):
        check_cancelled(cancelled)
        last = max(first + 1, np.searchsorted(ends, ends[first] + _MAPPED, "right") - 1)
        mapped = place.map(stored[ends[first] : ends[last]])
        # Not `np.add.reduceat`, which takes 25 times as long for 80 templates.
        for start, end in itertools.pairwise(ends[first : last + 1] - ends[first]):
            sums.append(mapped[start:end].sum(axis=0))
        first = last
    rows = np.stack(sums)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def embed_labels(
    loaded: LoadedRelease,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    place: Place | None = None,
    cancelled: Cancelled | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[NDArray[np.float32]], object] | None = None,
) -> TaskSteps[LabelSet]:
    """Embed checked labels, the mean over all prompts scaled to unit length; each is cached by
    place and templates. `progress` is called with the number of labels so far; `keep` takes the
    embeddings of all prompts, in parts and in the order of `load_prompts`.
    """
    place = place or loaded.place()
    cache = loaded.label_cache
    asked = AskedLabels(loaded, place, tuple(labels), tuple(templates))
    label_set: LabelSet | None = cache.get(asked.key)
    if label_set is not None and keep is None:
        return label_set
    names = {label: split_label(label) for label in labels}
    embeds: dict[str, NDArray[np.float32]] = {}

    # Map the prompts that the export has stored.
    if keep is None and (stored := asked.stored) is not None:
        counts = [len(names[label]) * len(templates) for label in labels]
        embeds.update(zip(labels, _map_means(place, stored, counts, cancelled), strict=True))

    # Embed labels that are not cached in parts of about `_PROMPTS` prompts, and cache each part.
    digest = hashlib.sha256(repr(tuple(templates)).encode()).digest()
    waiting = deque(label for label in labels if label not in embeds)
    while waiting:
        count = 0
        part: list[str] = []
        while waiting and (not part or count < _PROMPTS):
            label = waiting.popleft()
            kept = cache.get((digest, place.key, label))
            if kept is not None and keep is None:
                embeds[label] = kept
                continue
            count += len(names[label]) * len(templates)
            part.append(label)
        if part:
            prompts = [prompts_of(names[label], templates) for label in part]
            texts = list(dict.fromkeys(itertools.chain.from_iterable(prompts)))
            encoded = yield from embed_prompts(loaded, texts, place, cancelled)
            if keep is not None:
                row_of = {text: row for row, text in enumerate(texts)}
                order = [row_of[text] for text in itertools.chain.from_iterable(prompts)]
                keep(encoded[order])
            for label, mean in zip(part, means_of(prompts, texts, encoded), strict=True):
                embeds[label] = mean.copy()
                cache.put((digest, place.key, label), embeds[label])
        if progress is not None:
            progress(len(embeds))
    shown = tuple(names[label][0] for label in labels)
    units = np.stack([embeds[label] for label in labels])
    label_set = LabelSet(shown, units, asked.lines, asked.templates)
    cache.put(asked.key, label_set, len(labels) + len(templates))
    return label_set
