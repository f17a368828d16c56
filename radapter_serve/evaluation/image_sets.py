"""Data sets of an evaluation, by task: what a model is asked about their images, and what its
answers come to.
"""

from __future__ import annotations

import hashlib
import io
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
from PIL import Image as Pictures

from radapter_serve.contract.images import decode, oriented
from radapter_serve.contract.labels import class_probabilities, indistinguishable, split_label
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.masks import IGNORE, MaskedImage
from radapter_serve.data.proposals import Proposals
from radapter_serve.data.rows import ImageColumn
from radapter_serve.encoders.loaded import ServerEncoder
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import (
    Floats,
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
from radapter_serve.tasks.segment import BINARY

MOST_CONFUSED = 50  # classes of a confusion matrix that a row keeps and a picture can show
NOUN_TEMPLATES = ("a photo of a {}.",)
_NOUN_STEP = 3  # every third of ImageNet's 1,000 names: 333 nouns
_WORD = re.compile(r"[^\W_]+")
_READERS = 8  # files that are read at once
Answers = dict[str, NDArray[Any]]  # by name; a row an image, or a batch
_OF_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


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

    @cached_property
    def contents(self) -> list[str]:
        """A digest of each image, and of its masks where it has some."""

        def digest_of_image(image: Any) -> str:
            sha = hashlib.sha256()
            for part in self.parts(image):
                if not isinstance(part, bytes):
                    part = f"{part.dtype}{part.shape}".encode() + part.tobytes()
                sha.update(part)
            return sha.hexdigest()

        try:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="digest") as pool:
                return list(pool.map(digest_of_image, self.images))
        except RAdapterError as error:
            raise RAdapterError(f"data set {self.entry.name!r}: {error}") from error

    @cached_property
    def set_digest(self) -> str:
        """A digest of everything that the figures depend on."""
        return digest(*self.truth, self.contents)

    def parts(self, image: Any) -> Iterable[bytes | NDArray[Any]]:
        """The data of an image, as files and arrays."""
        yield image.data()

    @property
    @abstractmethod
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """The names of the set, and which of them are right for its images."""

    @abstractmethod
    def fields(self, model: Candidate) -> dict[str, Any]:
        """Fields of a row about the set, and how a model is evaluated on it."""

    def prepare(self, model: Candidate, number: int) -> Any:
        """Read and decode an image; thread-safe."""
        turns = model.loaded.preprocess.exif_orientation
        return model.prepare(as_seen(self.images[number](), self.entry.exif_orientation, turns))

    @abstractmethod
    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        """A model's answers for the prepared images from number `start` on. Sets with classes of
        whole images `keep` on request the best of `nouns` and the `scores`, cosines [N, C].
        """

    @abstractmethod
    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        """The measured fields of a row, from the answers for all images in order."""

    def row(self, model: Candidate) -> Row:
        """The row of a model on the set, before anything is measured; an error if the model lacks
        the dense method of the set.
        """
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
class ClassificationSet(EvaluationSet):
    """Images with one label, or with several of which one at least is right."""

    labels: NDArray[Any]  # integer [N]; of several labels bool [N, C]
    classes: list[str]  # synonyms after commas
    templates: list[str] | None  # of prompts; None takes the model's own

    task = "zeroshot_classification"

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    @property
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        if self.several:
            return self.classes, [np.flatnonzero(row).tolist() for row in self.labels]
        return self.classes, self.labels.tolist()

    @cached_property
    def nouns(self) -> list[str]:
        """Nouns that have nothing to do with the classes."""
        lines = dict.fromkeys(self.classes)
        return nouns_beside([name for line in lines for name in split_label(line)])

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
        embeds = check_finite(model.embed_images(items))
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
        if self.several:
            return {**self._measure_several(answers["scores"]), "indistinguishable": alike}
        ranks = answers["ranks"]
        count = len(self.classes)
        metrics = classification_metrics(ranks, self.labels, count)
        metrics["ece"] = calibration_error(answers["confidences"], ranks < 1)
        n = np.bincount(self.labels, minlength=count)
        hits = np.bincount(self.labels[ranks < 1], minlength=count)
        intervals: dict[str, Interval] = {
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

    def _measure_several(self, scores: Floats) -> dict[str, Any]:
        precisions = average_precisions(scores, self.labels)
        best = np.take_along_axis(self.labels, scores.argmax(axis=1)[:, None], axis=1)
        metrics = {SEVERAL_METRIC: float(np.nanmean(precisions)), "acc1": float(best.mean())}
        intervals: dict[str, Interval] = {"acc1": wilson(metrics["acc1"], len(scores))}
        if (interval := precision_interval(scores, self.labels)) is not None:
            intervals[SEVERAL_METRIC] = interval
        n = self.labels.sum(axis=0)
        figures = by_class(self.classes, n, average_precision=precisions)
        return {"metrics": metrics, "intervals": intervals, "per_class": figures}


@dataclass(frozen=True)
class RetrievalSet(EvaluationSet):
    """Images and their captions."""

    captions: list[str]  # of all images
    image_of: NDArray[np.int64]  # the image that each caption belongs to, [T]

    task = "zeroshot_retrieval"

    @property
    def truth(self) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.captions, self.image_of.tolist()

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """A number for each caption that equal ones share: images of equal captions match each
        other's.
        """
        return caption_groups(self.captions)

    def fields(self, model: Candidate) -> dict[str, Any]:
        count = len(self.captions)
        different = len(set(self.groups.tolist()))
        return {
            "captions": count,
            "different_captions": different if different < count else None,
        }

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        return {"images": model.embed_images(items)}

    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        images = answers["images"]
        texts = model.embed_texts(self.captions)
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


@dataclass(frozen=True)
class MaskedItem:
    """An image file and the truth about its pixels."""

    number: int  # of the image in its set
    data: bytes
    truth: NDArray[np.int32]  # class of each pixel, or IGNORE, [H, W]
    # Where the model gets masks: those of a proposal network, or of the true segments, 0 to 255,
    # [N, H, W]; and the network's own probabilities of the labels, [N, C], where it has some.
    masks: NDArray[np.uint8] | None = None
    scores: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SegmentationSet(EvaluationSet):
    """Images with masks."""

    images: Sequence[MaskedImage]
    classes: list[str]  # in the order of the numbers in the masks, synonyms after commas
    templates: list[str] | None  # of prompts; None takes the model's own
    proposals: Proposals | None = None  # of a network, in place of the true segments

    task = "zeroshot_segmentation"
    most = 4  # images and their masks in memory at once

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
        """Number of the background class, which has no prompt."""
        if self.entry.background is None:
            return None
        return first_names(self.classes).index(self.entry.background)

    def query(self, model: Candidate) -> SegmentQuery:
        """How the set's images are segmented; sizes are written out for the row."""
        entry = self.entry
        dense = model.way(entry.dense)
        if dense == PROPOSALS:
            options = SegmentOptions(threshold=entry.threshold)
            if entry.proposal_weight is not None:
                options = replace(options, proposal_weight=entry.proposal_weight)
        else:
            options = SegmentOptions(entry.short_side, entry.stride, entry.refine, entry.threshold)
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
            crop = MaskCrop.from_dict(model.loaded.release.crop)
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
        turns = model.loaded.preprocess.exif_orientation
        data = as_seen(image.data(), self.entry.exif_orientation, turns)
        truth = image.mask()
        if self.proposals is not None:
            masks, scores = self.proposals.read(image.name, (len(truth), truth.shape[1]))
            used = masks.max(axis=(1, 2), initial=0) > BINARY  # the others have no crop
            return MaskedItem(
                number, data, truth, masks[used], None if scores is None else scores[used]
            )
        if self.entry.dense != PROPOSALS:
            return MaskedItem(number, data, truth)
        segments = [
            mask for label, mask in image.segments() if label != self.background and mask.any()
        ]
        return MaskedItem(number, data, truth, np.array(segments, np.uint8) * np.uint8(255))

    def answer(
        self, model: Candidate, start: int, items: Sequence[Any], keep: Sequence[str] = ()
    ) -> Answers:
        query = self.query(model)
        # The class of each index of an answer. Without a background class, an answer of no label is
        # wrong everywhere.
        count = len(self.classes)
        class_of = [number for number in range(count) if number != self.background]
        if query.dense == PROPOSALS or query.options.threshold is not None:
            class_of.append(count if self.background is None else self.background)
        classes = np.array(class_of, np.int64)

        total = np.zeros((count, count + 1), np.int64)
        sums = []  # of each image, from which the intervals are drawn
        for item in items:
            if item.masks is not None and not len(item.masks):
                labels = np.full(item.truth.shape, len(classes) - 1, np.int64)
            else:
                try:
                    mask = model.segment(item.data, query, item.masks, item.scores)
                except RAdapterError as error:
                    raise RAdapterError(f"{self.images[item.number].name}: {error}") from error
                labels = mask.astype(np.int64)
            known = item.truth != IGNORE
            counts = confusion(item.truth[known], classes[labels[known]], count)
            total += counts
            sums.append(np.stack(pixel_sums(counts)))
        return {"total": total[None], "sums": np.stack(sums)}

    def measure(self, model: Candidate, answers: Answers) -> dict[str, Any]:
        total = answers["total"].sum(axis=0)
        right, true, answered = pixel_sums(total)
        alike: list[tuple[str, str]] = []
        if not isinstance(model.loaded.encoder, ServerEncoder):  # which embeds labels itself
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


def nouns_beside(names: Iterable[str]) -> list[str]:
    """Common nouns that have nothing to do with these names of classes.

    They are every third of the names that CLIP has for ImageNet's classes, from the first. A noun
    that equals a class, has it among its words or is among its words is left out; upper and lower
    case make no difference.
    """

    def words(name: str) -> str:
        # A space before and after each, so that a word matches as a whole alone.
        return f" {' '.join(_WORD.findall(name.casefold()))} "

    classes = [name for name in map(words, names) if name.strip()]
    nouns = {name: words(name) for name in open_clip.IMAGENET_CLASSNAMES[::_NOUN_STEP]}
    return [
        name
        for name, noun in nouns.items()
        if not any(noun in label or label in noun for label in classes)
    ]


def first_names(classes: Sequence[str]) -> list[str]:
    """The first of each class's synonyms, which is shown."""
    return [split_label(line)[0] for line in classes]


def by_class(
    classes: Sequence[str],
    n: NDArray[Any],
    *,
    recall: NDArray[np.float64] | None = None,
    iou: NDArray[np.float64] | None = None,
    average_precision: NDArray[np.float64] | None = None,
) -> list[ClassFigures]:
    """`per_class` of a row, from the cases and values of each class; NaN becomes None."""
    columns: list[list[float | None]] = []
    for values in (recall, iou, average_precision):
        known = np.full(len(classes), np.nan) if values is None else values
        columns.append([None if np.isnan(value) else round(float(value), 4) for value in known])
    names = first_names(classes)
    return [ClassFigures(*row) for row in zip(names, n.tolist(), *columns, strict=True)]


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


def digest(*parts: Sequence[Any]) -> str:
    """`sha256:` over lists of texts and numbers."""
    return digest_of(json.dumps([list(part) for part in parts], ensure_ascii=False).encode())
