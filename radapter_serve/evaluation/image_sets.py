"""Data sets of an evaluation: what they share, and those of whole images."""

from __future__ import annotations

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import open_clip
from numpy.typing import NDArray
from PIL import Image as Pictures

from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import decode, oriented
from radapter_serve.contract.probabilities import indistinguishable
from radapter_serve.data.rows import ImageColumn
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.intervals import (
    Interval,
    mean_recall_interval,
    precision_interval,
    wilson,
)
from radapter_serve.evaluation.metrics import (
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
from radapter_serve.evaluation.models import Candidate
from radapter_serve.evaluation.rows import Bin, ClassFigures, Row, packed
from radapter_serve.evaluation.suite import SEVERAL_METRIC, Entry
from radapter_serve.files import digest_of

MOST_CONFUSED = 50  # classes of a confusion matrix that a row keeps and a picture can show
NOUN_TEMPLATES = ("a photo of a {}.",)
_NOUN_STEP = 3  # every third of ImageNet's 1,000 names: 333 nouns
_WORD = re.compile(r"[^\W_]+")
_READERS = 8  # files that are read at once
_OF_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Answer:
    """A model's answers for some images of a set."""

    values: tuple[Any, ...]  # by which the set measures
    scores: Floats | None = None  # cosines of whole images with each class, [N, C]
    nearest: NDArray[np.int64] | None = None  # the best noun of each image


@dataclass(frozen=True)
class EvaluationSet(ABC):
    """A data set, opened as the entry of a suite says; its images are not decoded."""

    entry: Entry
    images: Sequence[Any]

    task: ClassVar[str]  # as CLIP_benchmark names it
    most: ClassVar[int | None] = None  # images in memory at once

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nouns(self) -> Sequence[str]:
        """Nouns besides the set's classes that its images can be asked for; only where images have
        classes as a whole.
        """
        return ()

    @property
    @abstractmethod
    def contents(self) -> list[str]:
        """A digest of each image, and of its masks where it has some."""

    @property
    @abstractmethod
    def set_digest(self) -> str:
        """A digest of everything that the figures depend on."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Fields of a row that say more about the set."""

    def setup(self, model: Candidate) -> dict[str, Any]:
        """Fields of a row that say how a model is evaluated on the set."""
        return {}

    def row(self, model: Candidate) -> Row:
        """The row of a model on the set, before anything is measured; raises `NoSuchWay` where the
        model lacks the dense method of the set.
        """
        entry = self.entry
        return Row(
            **vars(model.facts),
            **self.facts,
            **self.setup(model),
            n=len(self),
            set_digest=self.set_digest,
            dataset=entry.name,
            task=self.task,
            language=entry.language,
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

    @abstractmethod
    def prepare(self, model: Candidate, number: int) -> Any:
        """Read and decode an image; thread-safe."""

    @abstractmethod
    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], *, ask_nouns: bool = False
    ) -> Answer:
        """A model's answers for the prepared images from number `start` on; `ask_nouns` takes the
        best of `nouns` as well.
        """

    @abstractmethod
    def measure(self, model: Candidate, answers: Sequence[Answer]) -> dict[str, Any]:
        """The measured fields of a row, from the answers for all images in order."""


@dataclass(frozen=True)
class Image:
    """Reads the bytes of one image of a data set."""

    column: ImageColumn
    rows: Any
    index: int
    border: int

    def __call__(self) -> bytes:
        """The image file, its border cut off."""
        data = self.data()
        if not self.border:
            return data
        image = decode(data, exif_orientation=self.column.exif_orientation)
        most = (min(image.size) - 1) // 2
        if self.border > most:
            raise RAdapterError(
                f"border is {self.border}, which leaves nothing of {image.width} x"
                f" {image.height} pixels; allowed: 0 to {most}"
            )
        box = (self.border, self.border, image.width - self.border, image.height - self.border)
        return png_of(image.crop(box))

    def data(self) -> bytes:
        """The bytes of the file, with the border."""
        return self.column.data(self.rows[self.index])

    @property
    def name(self) -> str:
        """The image's name in an error."""
        return self.column.name(self.rows[self.index])


@dataclass(frozen=True)
class _ImageSet(EvaluationSet):
    """Images that are embedded as a whole."""

    images: Sequence[Image]

    @cached_property
    def contents(self) -> list[str]:
        return contents(
            self.entry.name,
            [lambda image=image: [image.data()] for image in self.images],  # type: ignore[misc]
        )

    def prepare(self, model: Candidate, number: int) -> Any:
        turns = model.loaded.preprocess.exif_orientation
        return model.prepare(as_seen(self.images[number](), self.entry.exif_orientation, turns))


@dataclass(frozen=True)
class ClassificationSet(_ImageSet):
    """Labelled images."""

    labels: NDArray[Any]  # integer [N]
    classes: list[str]  # synonyms after commas
    templates: list[str] | None  # of prompts; None takes the model's own

    task = "zeroshot_classification"

    @cached_property
    def set_digest(self) -> str:
        return digest(self.classes, self._truth, self.contents)

    @property
    def facts(self) -> dict[str, Any]:
        split = self.entry.class_split
        return {"classes": len(self.classes), "class_split": None if split == "all" else split}

    @property
    def _truth(self) -> list[Any]:
        labels: list[Any] = self.labels.tolist()
        return labels

    @cached_property
    def nouns(self) -> list[str]:
        """Nouns that have nothing to do with the classes."""
        lines = dict.fromkeys(self.classes)
        return nouns_beside([name for line in lines for name in split_label(line)])

    def prompts(self, model: Candidate) -> Sequence[str]:
        """The prompt templates for a model."""
        return self.templates or model.loaded.release.templates

    def setup(self, model: Candidate) -> dict[str, Any]:
        return {"templates": tuple(self.prompts(model))}

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], *, ask_nouns: bool = False
    ) -> Answer:
        embeds = check_finite(model.embed_images(items))
        scores = embeds @ model.embed_classes(self.classes, self.prompts(model)).T
        nearest = None
        if ask_nouns:
            nouns = model.embed_classes(self.nouns, NOUN_TEMPLATES)
            nearest = (embeds @ nouns.T).argmax(axis=1)
        return Answer(self._values(model, start, scores), scores, nearest)

    def _values(self, model: Candidate, start: int, scores: Floats) -> tuple[Any, ...]:
        """The rank of the label, the best class, and the sums of the calibration error."""
        ranks = true_ranks(scores, self.labels[start : start + len(scores)])
        best = scores.argmax(axis=1)
        probabilities = model.probabilities(scores)
        confidences = np.take_along_axis(probabilities, best[:, None], axis=1)[:, 0]
        return ranks, best, calibration_sums(confidences, ranks < 1)

    def measure(self, model: Candidate, answers: Sequence[Answer]) -> dict[str, Any]:
        ranks, best = (np.concatenate([of.values[place] for of in answers]) for place in (0, 1))
        sums = sum(of.values[2] for of in answers)
        count = len(self.classes)
        metrics = classification_metrics(ranks, self.labels, count)
        metrics["ece"] = calibration_error(sums)
        n, hits = (np.bincount(of, minlength=count) for of in (self.labels, self.labels[ranks < 1]))
        intervals: dict[str, Interval] = {
            name: wilson(metrics[name], len(ranks)) for name in ("acc1", "acc5") if name in metrics
        }
        intervals["mean_per_class_recall"] = mean_recall_interval(hits[n > 0], n[n > 0])
        k = {"acc1": 1, "acc5": 5}.get(self.entry.metric)
        few = count <= MOST_CONFUSED
        return {
            "metrics": metrics,
            "intervals": intervals,
            "calibration": by_bin(sums),
            "per_class": by_class(self.classes, n, shares(hits, n)),
            "confusion": confusion(self.labels, best, count).tolist() if few else None,
            "indistinguishable": self._alike(model),
            "right": packed(ranks < k) if k else None,
        }

    def _alike(self, model: Candidate) -> list[tuple[str, str]] | None:
        embeds = model.embed_classes(self.classes, self.prompts(model))
        return indistinguishable(first_names(self.classes), embeds) or None


@dataclass(frozen=True)
class SeveralLabelsSet(ClassificationSet):
    """Images of which each may have several labels, bool [N, C], one True at least in every row."""

    @property
    def _truth(self) -> list[Any]:
        return [np.flatnonzero(of).tolist() for of in self.labels]

    def _values(self, model: Candidate, start: int, scores: Floats) -> tuple[Any, ...]:
        return (check_finite(scores),)

    def measure(self, model: Candidate, answers: Sequence[Answer]) -> dict[str, Any]:
        scores = np.concatenate([of.values[0] for of in answers])
        precisions = average_precisions(scores, self.labels)
        best = np.take_along_axis(self.labels, scores.argmax(axis=1)[:, None], axis=1)
        metrics = {SEVERAL_METRIC: float(np.nanmean(precisions)), "acc1": float(best.mean())}
        intervals: dict[str, Interval] = {"acc1": wilson(metrics["acc1"], len(scores))}
        if (interval := precision_interval(scores, self.labels)) is not None:
            intervals[SEVERAL_METRIC] = interval
        n = self.labels.sum(axis=0)
        unknown = np.full(len(n), np.nan)
        return {
            "metrics": metrics,
            "intervals": intervals,
            "per_class": by_class(self.classes, n, unknown, average_precision=precisions),
            "indistinguishable": self._alike(model),
        }


@dataclass(frozen=True)
class RetrievalSet(_ImageSet):
    """Images and their captions."""

    captions: list[str]  # of all images
    image_of: NDArray[np.int64]  # the image that each caption belongs to, [T]

    task = "zeroshot_retrieval"

    @cached_property
    def set_digest(self) -> str:
        return digest(self.captions, self.image_of.tolist(), self.contents)

    @cached_property
    def facts(self) -> dict[str, Any]:
        different = len(set(self.groups.tolist()))
        few = different < len(self.captions)
        return {
            "captions": len(self.captions),
            "different_captions": different if few else None,
        }

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """A number for each caption that equal ones share: images of equal captions match each
        other's.
        """
        return caption_groups(self.captions)

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], *, ask_nouns: bool = False
    ) -> Answer:
        return Answer((model.embed_images(items),))

    def measure(self, model: Candidate, answers: Sequence[Answer]) -> dict[str, Any]:
        images = np.concatenate([of.values[0] for of in answers])
        texts = model.loaded.embed_texts(self.captions)
        ranks = retrieval_ranks(images, texts, self.image_of, self.groups)
        metrics = recalls_of(ranks)
        # Captions of one image are no independent cases: images are counted both ways.
        intervals = {name: wilson(share, len(images)) for name, share in metrics.items()}
        way, _, recall = self.entry.metric.partition("_retrieval_recall@")
        hits = ranks[way] < int(recall)
        right: str | list[int] = packed(hits)
        if way == "image":
            right = np.bincount(self.image_of[hits], minlength=len(images)).tolist()
        return {"metrics": metrics, "intervals": intervals, "right": right}


def nouns_beside(names: Iterable[str]) -> list[str]:
    """Common nouns that have nothing to do with these names of classes.

    They are every third of the names that CLIP has for ImageNet's classes, from the first. A noun
    that equals a class, has it among its words or is among its words is left out; upper and lower
    case make no difference.
    """

    def words(name: str) -> str:
        # A space before and after each, so that a word matches as a whole alone.
        return f" {' '.join(_WORD.findall(name.casefold()))} "

    classes = [of for of in map(words, names) if of.strip()]
    nouns = {name: words(name) for name in open_clip.IMAGENET_CLASSNAMES[::_NOUN_STEP]}
    return [
        name for name, noun in nouns.items() if not any(noun in of or of in noun for of in classes)
    ]


def first_names(classes: Sequence[str]) -> list[str]:
    """The first of each class's synonyms, which is shown."""
    return [split_label(line)[0] for line in classes]


def by_class(
    classes: Sequence[str],
    n: NDArray[Any],
    recall: NDArray[np.float64],
    iou: NDArray[np.float64] | None = None,
    average_precision: NDArray[np.float64] | None = None,
) -> list[ClassFigures]:
    """`per_class` of a row, from the cases and values of each class; NaN becomes None."""
    columns = [
        [None] * len(classes) if values is None else _rounded(values)
        for values in (recall, iou, average_precision)
    ]
    names = first_names(classes)
    return [ClassFigures(*of) for of in zip(names, n.tolist(), *columns, strict=True)]


def by_bin(sums: NDArray[np.float64]) -> list[Bin]:
    """`calibration` of a row, from `calibration_sums`."""
    confidence = _rounded(shares(sums[1], sums[0]))
    accuracy = _rounded(shares(sums[2], sums[0]))
    return [Bin(int(n), confidence[i], accuracy[i]) for i, n in enumerate(sums[0].tolist())]


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def as_seen(data: bytes, wanted: bool, turns: bool) -> bytes:
    """An image file that a model sees as the suite says: turned by its EXIF orientation if
    `wanted`, by a model that `turns` images or not.
    """
    if wanted == turns:
        return data
    stored = decode(data, exif_orientation=False)
    turned = oriented(stored)
    if turned is stored:
        return data
    return png_of(turned if wanted else stored)


def png_of(image: Pictures.Image) -> bytes:
    """An image as a PNG file that has no EXIF."""
    out = io.BytesIO()
    (image if image.mode in _OF_PNG else image.convert("RGB")).save(out, "PNG", exif=b"")
    return out.getvalue()


def drawn(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Numbers of the images that are used of `count`: all, or `limit` drawn by the seed;
    ascending.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def contents(name: str, parts: Sequence[Callable[[], Iterable[bytes | NDArray[Any]]]]) -> list[str]:
    """Digests of images and their masks, each read once by its function of `parts`; `name` is the
    data set's, for errors.
    """

    def of(read: Callable[[], Iterable[bytes | NDArray[Any]]]) -> str:
        sha = hashlib.sha256()
        for part in read():
            if not isinstance(part, bytes):
                part = f"{part.dtype}{part.shape}".encode() + part.tobytes()
            sha.update(part)
        return sha.hexdigest()

    try:
        with ThreadPoolExecutor(_READERS, thread_name_prefix="digest") as pool:
            return list(pool.map(of, parts))
    except RAdapterError as error:
        raise RAdapterError(f"data set {name!r}: {error}") from error


def digest(*parts: Sequence[Any]) -> str:
    """`sha256:` over lists of texts and numbers."""
    return digest_of(json.dumps([list(part) for part in parts], ensure_ascii=False).encode())
