"""Classification and retrieval as judged sets, and opening the sets that a suite names."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.clip.prompts import templates_of
from radapter_serve.data import (
    READERS,
    ImageColumn,
    Labelled,
    class_split,
    imagenet_classes,
    load_captioned,
    load_labelled,
    refuse_wordnet_ids,
)
from radapter_serve.data.masked import load_masked
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Embedder
from radapter_serve.evaluation.intervals import mean_recall_interval, wilson
from radapter_serve.evaluation.judged import (
    MOST_CONFUSED,
    JudgedSet,
    Known,
    Scorer,
    by_class,
    class_embeds,
    confused,
    contents,
    digest,
    drawn,
)
from radapter_serve.evaluation.karpathy import load_karpathy
from radapter_serve.evaluation.metrics import (
    Floats,
    caption_groups,
    check_finite,
    classification_metrics,
    confusion,
    retrieval_metrics,
    shares,
    true_ranks,
)
from radapter_serve.evaluation.segmentation import SegmentationSet
from radapter_serve.evaluation.suite import Entry, Suite, read_yaml
from radapter_serve.inputs.labels import split_label
from radapter_serve.inputs.preprocess import decode
from radapter_serve.inputs.probabilities import indistinguishable

_READERS = (*READERS, "masks", "coco", "karpathy")


@dataclass(frozen=True)
class _ImageSet:
    """Images that are embedded as a whole.

    Attributes:
        entry: what the suite says.
        images: of the files.
    """

    entry: Entry
    images: Sequence[Image]

    most = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        return self.images[number].name

    @cached_property
    def contents(self) -> list[str]:
        """Digests of the images' files."""
        return contents(self.entry.name, [lambda image=image: [image.data()] for image in self.images])  # type: ignore[misc]

    def prepare(self, embedder: Embedder, number: int) -> Any:
        return embedder.prepare(self.images[number]())


@dataclass(frozen=True)
class ClassificationSet(_ImageSet):
    """Labelled images.

    Attributes:
        labels: integer [N].
        classes: one a label, synonyms after commas.
        templates: prompt templates; None takes the model's own.
    """

    labels: NDArray[np.int64]
    classes: list[str]
    templates: list[str] | None

    task = "zeroshot_classification"

    @cached_property
    def facts(self) -> dict[str, Any]:
        split = {} if self.entry.class_split == "all" else {"class_split": self.entry.class_split}
        count = {"n": len(self.labels), "classes": len(self.classes)}
        return {**count, **split, "set_digest": digest(self.classes, self.labels.tolist(), self.contents)}

    def how(self, embedder: Embedder) -> dict[str, Any]:
        return {"templates": list(self.templates or embedder.templates)}

    def scorer(self, embedder: Embedder, known: Known) -> Scorer:
        templates = self.templates or embedder.templates
        return _ClassificationScorer(self, embedder, class_embeds(embedder.embed_texts, self.classes, templates, known))


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
    def facts(self) -> dict[str, Any]:
        different = len(set(self.groups.tolist()))
        equal = {"different_captions": different} if different < len(self.captions) else {}
        count = {"n": len(self.images), "captions": len(self.captions), **equal}
        return {**count, "set_digest": digest(self.captions, self.image_of.tolist(), self.contents)}

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """A number for each caption that equal ones share: images of equal captions match each other's."""
        return caption_groups(self.captions)

    def how(self, embedder: Embedder) -> dict[str, Any]:
        return {}

    def scorer(self, embedder: Embedder, known: Known) -> Scorer:
        return _RetrievalScorer(self, embedder, embedder.embed_texts(self.captions))


class _ClassificationScorer:
    def __init__(self, data: ClassificationSet, embedder: Embedder, classifier: Floats) -> None:
        self._data, self._embedder, self._classifier = data, embedder, classifier
        self._ranks, self._found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]

    def add(self, items: Sequence[Any]) -> None:
        start = sum(map(len, self._ranks))
        scores = check_finite(self._embedder.embed_images(items)) @ self._classifier.T
        self._ranks.append(true_ranks(scores, self._data.labels[start : start + len(items)]))
        self._found.append(scores.argmax(axis=1))

    def measured(self) -> dict[str, Any]:
        labels, classes, ranks = self._data.labels, self._data.classes, np.concatenate(self._ranks)
        metrics = classification_metrics(ranks, labels, len(classes))
        count, hits = (np.bincount(of, minlength=len(classes)) for of in (labels, labels[ranks < 1]))
        intervals = {name: wilson(metrics[name], len(labels)) for name in ("acc1", "acc5") if name in metrics}
        intervals["mean_per_class_recall"] = mean_recall_interval(hits[count > 0], count[count > 0])
        few = len(classes) <= MOST_CONFUSED
        alike = indistinguishable([split_label(line)[0] for line in classes], self._classifier)
        return {
            "metrics": metrics,
            "intervals": intervals,
            **by_class(classes, count, recall=shares(hits, count)),
            **(confused(confusion(labels, np.concatenate(self._found), len(classes))) if few else {}),
            **({"indistinguishable": alike} if alike else {}),
        }


class _RetrievalScorer:
    def __init__(self, data: RetrievalSet, embedder: Embedder, texts: Floats) -> None:
        self._data, self._embedder, self._texts, self._images = data, embedder, texts, list[Floats]()

    def add(self, items: Sequence[Any]) -> None:
        self._images.append(self._embedder.embed_images(items))

    def measured(self) -> dict[str, Any]:
        data, images = self._data, np.concatenate(self._images)
        metrics = retrieval_metrics(images, self._texts, data.image_of, groups=data.groups)
        # captions of one image are no independent cases: images are counted both ways
        return {"metrics": metrics, "intervals": {name: wilson(share, len(images)) for name, share in metrics.items()}}


def open_set(suite: Suite, entry: Entry, *, limit: int | None = None, seed: int = 0) -> JudgedSet:
    """Open one data set of a suite.

    Args:
        suite: where it stands.
        entry: the data set.
        limit: judge no more than this many images, drawn by the seed; None takes all.
        seed: of that draw.

    Raises:
        RAdapterError: the data, a class file or a template file can't be read, or they do not match.
    """
    spec = _below(suite.data_root, entry.data)
    try:
        if entry.task == "retrieval":
            return _retrieval_set(suite, entry, spec, limit, seed)
        if entry.task == "segmentation":
            return _segmentation_set(suite, entry, spec, limit, seed)
        mapping = _class_mapping(suite, entry.classes)
        data = load_labelled(
            spec,
            image_column=entry.image_column,
            label_column=entry.label_column,
            classes=_file(suite, entry.classes) if entry.classes and mapping is None else None,
            images=_images(suite, entry),
            every_class=entry.class_split != "all",  # the halves are of all classes
        )
        if entry.classes is None:
            refuse_wordnet_ids(data.own)
        data = class_split(data, entry.class_split)
    except RAdapterError as error:
        raise RAdapterError(f"data set {entry.name!r}: {error}") from error
    templates = _templates(suite, entry.templates)
    return classification_set(entry, data, templates, mapping=mapping, limit=limit, seed=seed)


def classification_set(
    entry: Entry,
    data: Labelled,
    templates: list[str] | None = None,
    *,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ClassificationSet:
    """A set of labelled images from an open data set.

    Args:
        entry: what the suite says of it.
        data: from `load_labelled`.
        templates: prompt templates; None takes the model's own.
        mapping: from the data's class names to those for prompts; others are left out.
        limit: no more images than this, drawn by `seed`.
        seed: of that draw.
    """
    labels = data.labels()
    classes, chosen = data.classes, np.arange(len(labels))
    if mapping is not None:
        kept = [index for index, name in enumerate(data.own) if name in mapping]
        if not kept:
            raise RAdapterError(
                f"data set {entry.name!r}: the class mapping {entry.classes} knows none of its classes: "
                f"{', '.join(data.own[:5])}, ..."
            )
        new = np.full(len(classes), -1)
        new[kept] = np.arange(len(kept))
        classes, labels = [mapping[data.own[index]] for index in kept], new[labels]
        chosen = np.flatnonzero(labels >= 0)
    chosen = chosen[drawn(len(chosen), limit, seed)]
    images = [Image(data, data.rows, int(index), entry.border) for index in chosen]
    return ClassificationSet(entry, images, labels[chosen], list(classes), templates)


def _retrieval_set(suite: Suite, entry: Entry, spec: str, limit: int | None, seed: int) -> RetrievalSet:
    folder = _images(suite, entry)
    reader, _, place = spec.partition(":")
    if reader == "karpathy":
        path, _, split = place.rpartition("@") if "@" in place else (place, "", "test")
        data = load_karpathy(Path(path), split, folder or Path(path).parent)
    else:
        data = load_captioned(spec, image_column=entry.image_column, caption_column=entry.caption_column, images=folder)
    chosen = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    captions = [image.captions[: entry.max_captions] for image in chosen]
    image_of = np.repeat(np.arange(len(chosen)), [len(texts) for texts in captions])
    images = [Image(data, data.table, image.row, entry.border) for image in chosen]
    return RetrievalSet(entry, images, [text for texts in captions for text in texts], image_of)


def _segmentation_set(suite: Suite, entry: Entry, spec: str, limit: int | None, seed: int) -> SegmentationSet:
    data = load_masked(
        spec,
        classes=_file(suite, entry.classes) if entry.classes else None,
        images=_images(suite, entry),
    )
    images = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    return SegmentationSet(entry, images, data.classes, _templates(suite, entry.templates))


@dataclass(frozen=True)
class Image:
    """Reads the bytes of one image of a data set."""

    column: ImageColumn
    rows: Any
    index: int
    border: int

    def __call__(self) -> bytes:
        return _cropped(self.data(), self.border) if self.border else self.data()

    def data(self) -> bytes:
        """The bytes of the file, the border still there."""
        return self.column.data(self.rows[self.index])

    @property
    def name(self) -> str:
        """What to call the image in an error."""
        return self.column.name(self.rows[self.index])


def _cropped(data: bytes, border: int) -> bytes:
    image = decode(data)
    most = (min(image.size) - 1) // 2
    if border > most:
        raise RAdapterError(
            f"border is {border}, which leaves nothing of {image.width} x {image.height} pixels; allowed: 0 to {most}"
        )
    out = io.BytesIO()
    image.crop((border, border, image.width - border, image.height - border)).save(out, "PNG")
    return out.getvalue()


def _below(root: Path, spec: str) -> str:
    reader, colon, path = spec.partition(":")
    return f"{reader}:{root / path}" if colon and reader in _READERS else spec


def _images(suite: Suite, entry: Entry) -> Path | None:
    return suite.data_root / entry.images if entry.images else None


def _file(suite: Suite, name: str) -> Path:
    """A file beside the suite or, where there is none, below the data root."""
    return suite.folder / name if (suite.folder / name).exists() else suite.data_root / name


def _class_mapping(suite: Suite, classes: str | None) -> dict[str, str] | None:
    """The mapping that `classes` names; None where it is no mapping."""
    if classes == "imagenet":
        return imagenet_classes()
    if classes is None or not classes.endswith((".yaml", ".yml")):
        return None
    path = _file(suite, classes)
    mapping = read_yaml(path, "the classes")
    if not isinstance(mapping, dict) or not mapping or not all(split_label(str(name)) for name in mapping.values()):
        raise RAdapterError(f"the classes {path} must map the data's class names to names for prompts")
    return {str(own): str(name) for own, name in mapping.items()}


def _templates(suite: Suite, source: Any) -> list[str] | None:
    if source is None:
        return None
    if isinstance(source, str) and (suite.folder / source).is_file():
        source = str(suite.folder / source)
    return templates_of(source)
