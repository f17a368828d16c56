"""Data sets of whole images: classification and retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import decode
from radapter_serve.contract.probabilities import indistinguishable
from radapter_serve.data import ImageColumn
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Embedder
from radapter_serve.evaluation.evaluation_set import (
    MOST_CONFUSED,
    EvaluationSet,
    Known,
    Scorer,
    as_seen,
    by_bin,
    by_class,
    class_embeds,
    confused,
    contents,
    digest,
    first_names,
    png_of,
)
from radapter_serve.evaluation.intervals import (
    Interval,
    mean_recall_interval,
    precision_interval,
    wilson,
)
from radapter_serve.evaluation.metrics import (
    BINS,
    Floats,
    average_precisions,
    calibration_error,
    calibration_sums,
    caption_groups,
    check_finite,
    classification_metrics,
    confusion,
    recalls_of,
    retrieval_ranks,
    shares,
    true_ranks,
)
from radapter_serve.evaluation.nouns import TEMPLATES, nouns_beside
from radapter_serve.evaluation.row import Measured, SetFacts, Setup, packed
from radapter_serve.evaluation.suite import SEVERAL_METRIC


@dataclass(frozen=True)
class Image:
    """Reads the bytes of one image of a data set."""

    column: ImageColumn
    rows: Any
    index: int
    border: int

    def __call__(self) -> bytes:
        return (
            _cropped(self.data(), self.border, self.column.exif_orientation)
            if self.border
            else self.data()
        )

    def data(self) -> bytes:
        """The bytes of the file, the border still there."""
        return self.column.data(self.rows[self.index])

    @property
    def name(self) -> str:
        """What to call the image in an error."""
        return self.column.name(self.rows[self.index])


def _cropped(data: bytes, border: int, exif_orientation: bool) -> bytes:
    image = decode(data, exif_orientation=exif_orientation)
    most = (min(image.size) - 1) // 2
    if border > most:
        raise RAdapterError(
            f"border is {border}, which leaves nothing of {image.width} x {image.height} pixels;"
            f" allowed: 0 to {most}"
        )
    return png_of(image.crop((border, border, image.width - border, image.height - border)))


@dataclass(frozen=True)
class _ImageSet(EvaluationSet):
    """Images that are embedded as a whole."""

    images: Sequence[Image]

    @cached_property
    def contents(self) -> list[str]:
        """Digests of the images' files."""
        return contents(
            self.entry.name,
            [lambda image=image: [image.data()] for image in self.images],  # type: ignore[misc]
        )

    def prepare(self, embedder: Embedder, number: int) -> Any:
        return embedder.prepare(as_seen(self.images[number](), self.entry, embedder))


@dataclass(frozen=True)
class ClassificationSet(_ImageSet):
    """Labelled images.

    Attributes:
        labels: integer [N].
        classes: one a label, synonyms after commas.
        templates: prompt templates; None takes the model's own.
        members: of each class the classes with prompts that it stands for, the best of which gives
            it its score; empty where each class has prompts of its own.
    """

    labels: NDArray[Any]
    classes: list[str]
    templates: list[str] | None
    members: Sequence[Sequence[str]] = ()

    task = "zeroshot_classification"

    @cached_property
    def facts(self) -> SetFacts:
        split = self.entry.class_split
        named = [list(of) for of in self.members] or self.classes
        return SetFacts(
            n=len(self.labels),
            classes=len(self.classes),
            class_split=None if split == "all" else split,
            set_digest=digest(named, self._truth, self.contents),
        )

    @property
    def _truth(self) -> list[Any]:
        labels: list[Any] = self.labels.tolist()
        return labels

    @cached_property
    def prompted(self) -> list[str]:
        """The classes that have prompts: their own, or the members of all."""
        return [line for of in self.members for line in of] or self.classes

    def scores(self, cosines: Floats) -> Floats:
        """The score of each class, [N, C], from the cosines of images with `prompted`, [N, P]."""
        if not self.members:
            return cosines
        starts = np.cumsum([0, *(len(of) for of in self.members[:-1])])
        return np.asarray(np.maximum.reduceat(cosines, starts, axis=1))

    def setup(self, embedder: Embedder) -> Setup:
        return Setup(templates=tuple(self.templates or embedder.templates))

    @cached_property
    def nouns(self) -> list[str]:
        """Nouns that have nothing to do with the classes."""
        lines = dict.fromkeys([*self.classes, *self.prompted])
        return nouns_beside([name for line in lines for name in split_label(line)])

    def scorer(self, embedder: Embedder, known: Known, *, ask_nouns: bool = False) -> Scorer:
        return _ClassificationScorer(self, embedder, known, ask_nouns=ask_nouns)


@dataclass(frozen=True)
class SeveralLabelsSet(ClassificationSet):
    """Images of which each may have several labels.

    Attributes:
        labels: bool [N, C], one True at least in every row.
    """

    @property
    def _truth(self) -> list[Any]:
        return [np.flatnonzero(of).tolist() for of in self.labels]

    def scorer(self, embedder: Embedder, known: Known, *, ask_nouns: bool = False) -> Scorer:
        return _SeveralLabelsScorer(self, embedder, known, ask_nouns=ask_nouns)


@dataclass(frozen=True)
class RetrievalSet(_ImageSet):
    """Images and their captions.

    Attributes:
        captions: all of them.
        image_of: the image that each caption belongs to, integer [T].
    """

    captions: list[str]
    image_of: NDArray[np.int64]

    task = "zeroshot_retrieval"

    @cached_property
    def facts(self) -> SetFacts:
        different = len(set(self.groups.tolist()))
        return SetFacts(
            n=len(self.images),
            captions=len(self.captions),
            different_captions=different if different < len(self.captions) else None,
            set_digest=digest(self.captions, self.image_of.tolist(), self.contents),
        )

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """A number for each caption that equal ones share: images of equal captions match each
        other's.
        """
        return caption_groups(self.captions)

    def setup(self, embedder: Embedder) -> Setup:
        return Setup()

    def scorer(self, embedder: Embedder, known: Known, *, ask_nouns: bool = False) -> Scorer:
        return _RetrievalScorer(self, embedder, embedder.embed_texts(self.captions))


class _AmongClasses:
    """What images with one label and with several have in common: the scores of their classes, and
    the nouns beside these.
    """

    def __init__(
        self, data: ClassificationSet, embedder: Embedder, known: Known, *, ask_nouns: bool
    ) -> None:
        templates = data.templates or embedder.templates
        self._data = data
        self._embedder = embedder
        self._classifier = class_embeds(embedder.embed_texts, data.prompted, templates, known)
        self._nouns: Floats | None = None
        if ask_nouns and data.nouns:
            self._nouns = class_embeds(embedder.embed_texts, data.nouns, TEMPLATES, known)
        self.nearest: list[NDArray[np.int64]] = []

    def scores(self, items: Sequence[Any]) -> Floats:
        """Of prepared images with each class, [N, C]."""
        embeds = check_finite(self._embedder.embed_images(items))
        if self._nouns is not None:
            self.nearest.append((embeds @ self._nouns.T).argmax(axis=1))
        return self._data.scores(embeds @ self._classifier.T)


class _ClassificationScorer(_AmongClasses):
    def __init__(
        self, data: ClassificationSet, embedder: Embedder, known: Known, *, ask_nouns: bool
    ) -> None:
        super().__init__(data, embedder, known, ask_nouns=ask_nouns)
        self._ranks = [np.zeros(0, np.int64)]
        self._found = [np.zeros(0, np.int64)]
        self._sums = np.zeros((3, BINS))

    def add(self, items: Sequence[Any]) -> Floats:
        start = sum(map(len, self._ranks))
        scores = self.scores(items)
        ranks = true_ranks(scores, self._data.labels[start : start + len(items)])
        found = scores.argmax(axis=1)
        confidences = np.take_along_axis(
            self._embedder.probabilities(scores), found[:, None], axis=1
        )[:, 0]
        self._sums += calibration_sums(confidences, ranks < 1)
        self._ranks.append(ranks)
        self._found.append(found)
        return scores

    def measured(self) -> Measured:
        labels = self._data.labels
        classes = self._data.classes
        ranks = np.concatenate(self._ranks)
        metrics = {
            **classification_metrics(ranks, labels, len(classes)),
            "ece": calibration_error(self._sums),
        }
        count, hits = (
            np.bincount(of, minlength=len(classes)) for of in (labels, labels[ranks < 1])
        )
        intervals: dict[str, Interval] = {
            name: wilson(metrics[name], len(labels)) for name in ("acc1", "acc5") if name in metrics
        }
        intervals["mean_per_class_recall"] = mean_recall_interval(hits[count > 0], count[count > 0])
        few = len(classes) <= MOST_CONFUSED
        alike = indistinguishable(first_names(self._data.prompted), self._classifier)
        found = np.concatenate(self._found)
        best = {"acc1": 1, "acc5": 5}.get(self._data.entry.metric)
        return Measured(
            metrics=metrics,
            intervals=intervals,
            calibration=by_bin(self._sums),
            per_class=by_class(classes, count, shares(hits, count)),
            confusion=confused(confusion(labels, found, len(classes))) if few else None,
            indistinguishable=alike or None,
            right=packed(ranks < best) if best else None,
        )


class _SeveralLabelsScorer(_AmongClasses):
    def __init__(
        self, data: SeveralLabelsSet, embedder: Embedder, known: Known, *, ask_nouns: bool
    ) -> None:
        super().__init__(data, embedder, known, ask_nouns=ask_nouns)
        self._scores: list[Floats] = []

    def add(self, items: Sequence[Any]) -> Floats:
        scores = check_finite(self.scores(items))
        self._scores.append(scores)
        return scores

    def measured(self) -> Measured:
        data = self._data
        scores = np.concatenate(self._scores)
        precisions = average_precisions(scores, data.labels)
        best = np.take_along_axis(data.labels, scores.argmax(axis=1)[:, None], axis=1)
        metrics = {
            SEVERAL_METRIC: float(np.nanmean(precisions)),
            "acc1": float(best.mean()),
        }
        intervals: dict[str, Interval] = {"acc1": wilson(metrics["acc1"], len(scores))}
        if (interval := precision_interval(scores, data.labels)) is not None:
            intervals[SEVERAL_METRIC] = interval
        count = data.labels.sum(axis=0)
        return Measured(
            metrics=metrics,
            intervals=intervals,
            per_class=by_class(
                data.classes, count, np.full(len(count), np.nan), average_precision=precisions
            ),
            indistinguishable=indistinguishable(first_names(data.prompted), self._classifier)
            or None,
        )


class _RetrievalScorer:
    def __init__(self, data: RetrievalSet, embedder: Embedder, texts: Floats) -> None:
        self._data = data
        self._embedder = embedder
        self._texts = texts
        self._images: list[Floats] = []
        self.nearest: list[NDArray[np.int64]] = []

    def add(self, items: Sequence[Any]) -> None:
        self._images.append(self._embedder.embed_images(items))

    def measured(self) -> Measured:
        data = self._data
        images = np.concatenate(self._images)
        ranks = retrieval_ranks(images, self._texts, data.image_of, data.groups)
        metrics = recalls_of(ranks)
        # captions of one image are no independent cases: images are counted both ways
        intervals = {name: wilson(share, len(images)) for name, share in metrics.items()}
        way, _, recall = data.entry.metric.partition("_retrieval_recall@")
        hits = ranks[way] < int(recall)
        right: str | list[int] = packed(hits)
        if way == "image":
            right = np.bincount(data.image_of[hits], minlength=len(images)).tolist()
        return Measured(metrics=metrics, intervals=intervals, right=right)
