"""Data sets as judging needs them: the bytes of images by number, the truth, and a scorer for their embeddings."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import yaml
from numpy.typing import NDArray

from radapter_serve.data import READERS, Labelled, load_labelled, open_rows
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import Floats, classification_metrics, retrieval_metrics, true_ranks
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.prompts import templates_of
from radapter_serve.serving.labels import split_label
from radapter_serve.serving.preprocess import decode

EmbedTexts = Callable[[Sequence[str]], Floats]
Known = dict[tuple[tuple[str, ...], str], Floats]


class Scorer(Protocol):
    """Takes the embeddings of all images of a set, in order, and tells the metrics."""

    def add(self, embeds: Floats) -> None: ...

    def metrics(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled images.

    Attributes:
        entry: what the suite says.
        images: for each image, what reads the bytes of its file.
        labels: integer [N].
        classes: one a label, synonyms after commas.
        templates: prompt templates; None takes the model's own.
    """

    entry: Entry
    images: Sequence[Callable[[], bytes]]
    labels: NDArray[np.int64]
    classes: list[str]
    templates: list[str] | None

    task = "zeroshot_classification"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a row says of the set."""
        return {"n": len(self.labels), "classes": len(self.classes), "set_digest": _digest(self.classes, self.labels)}

    def scorer(self, embed_texts: EmbedTexts, templates: Sequence[str], known: Known) -> Scorer:
        """Judges one model's image embeddings; embeds the prompts of the classes first, but for those known."""
        return _ClassificationScorer(self, class_embeds(embed_texts, self.classes, self.templates or templates, known))


@dataclass(frozen=True)
class RetrievalSet:
    """Images and their captions.

    Attributes:
        entry: what the suite says.
        images: for each image, what reads the bytes of its file.
        captions: all of them.
        image_of: the image that each caption belongs to, integer [T].
    """

    entry: Entry
    images: Sequence[Callable[[], bytes]]
    captions: list[str]
    image_of: NDArray[np.int64]

    task = "zeroshot_retrieval"
    templates: list[str] | None = field(default=None, init=False)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a row says of the set."""
        count = {"n": len(self.images), "captions": len(self.captions)}
        return {**count, "set_digest": _digest(self.captions, self.image_of)}

    def scorer(self, embed_texts: EmbedTexts, templates: Sequence[str], known: Known) -> Scorer:
        """Judges one model's image embeddings; embeds the captions first."""
        return _RetrievalScorer(self, embed_texts(self.captions))


JudgedSet = ClassificationSet | RetrievalSet


class _ClassificationScorer:
    def __init__(self, data: ClassificationSet, classifier: Floats) -> None:
        self._data, self._classifier, self._ranks = data, classifier, [np.zeros(0, np.int64)]

    def add(self, embeds: Floats) -> None:
        start = sum(map(len, self._ranks))
        self._ranks.append(true_ranks(embeds @ self._classifier.T, self._data.labels[start : start + len(embeds)]))

    def metrics(self) -> dict[str, float]:
        return classification_metrics(np.concatenate(self._ranks), self._data.labels, len(self._data.classes))


class _RetrievalScorer:
    def __init__(self, data: RetrievalSet, texts: Floats) -> None:
        self._data, self._texts, self._images = data, texts, list[Floats]()

    def add(self, embeds: Floats) -> None:
        self._images.append(embeds)

    def metrics(self) -> dict[str, float]:
        return retrieval_metrics(np.concatenate(self._images), self._texts, self._data.image_of)


def class_embeds(
    embed_texts: EmbedTexts, classes: Sequence[str], templates: Sequence[str], known: Known | None = None
) -> Floats:
    """One unit-length embedding a class: the mean over its names and all templates.

    Args:
        embed_texts: texts to unit-length embeddings [N, D].
        classes: class names, synonyms after commas.
        templates: prompt templates with `{}`.
        known: of the same model, by templates and class; takes the new ones.

    Returns:
        float32 [C, D].
    """
    known, key = {} if known is None else known, tuple(templates)
    new = [line for line in dict.fromkeys(classes) if (key, line) not in known]
    prompts = [[t.replace("{}", name) for name in split_label(line) for t in templates] for line in new]
    if new:
        embeds = embed_texts([text for group in prompts for text in group])
        ends = np.cumsum([len(group) for group in prompts])
        for line, group in zip(new, np.split(embeds, ends[:-1]), strict=True):
            mean = group.mean(axis=0)
            known[key, line] = np.asarray(mean / np.linalg.norm(mean), np.float32)
    return np.stack([known[key, line] for line in classes])


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
            return _retrieval_set(entry, spec, limit, seed)
        mapping = _class_mapping(suite, entry.classes)
        data = load_labelled(
            spec,
            image_column=entry.image_column,
            label_column=entry.label_column,
            classes=suite.folder / entry.classes if entry.classes and mapping is None else None,
        )
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
    labels = np.array([data.label({data.label_column: value}) for value in data.rows[data.label_column]], np.int64)
    classes, chosen = data.classes, np.arange(len(labels))
    if mapping is not None:
        kept = [index for index, name in enumerate(classes) if name in mapping]
        if not kept:
            raise RAdapterError(
                f"data set {entry.name!r}: the class mapping {entry.classes} knows none of its classes: "
                f"{', '.join(classes[:5])}, ..."
            )
        new = np.full(len(classes), -1)
        new[kept] = np.arange(len(kept))
        classes, labels = [mapping[classes[index]] for index in kept], new[labels]
        chosen = np.flatnonzero(labels >= 0)
    chosen = chosen[_drawn(len(chosen), limit, seed)]
    images = [_Image(data, int(index), entry.border) for index in chosen]
    return ClassificationSet(entry, images, labels[chosen], list(classes), templates)


def _retrieval_set(entry: Entry, spec: str, limit: int | None, seed: int) -> RetrievalSet:
    columns = {entry.image_column: "image_column", entry.caption_column: "caption_column"}
    rows, folder = open_rows(spec, {column: f"`{field}` in the suite" for column, field in columns.items()})
    if not len(rows):
        raise RAdapterError(f"{spec} holds no rows")
    data = Labelled(rows, [], entry.image_column, entry.caption_column, folder)
    first: dict[str, int] = {}
    texts: dict[str, list[str]] = {}
    for index, (image, caption) in enumerate(zip(rows[entry.image_column], rows[entry.caption_column], strict=True)):
        key = _image_key(image)
        first.setdefault(key, index)
        several = caption if isinstance(caption, (list, tuple)) else [caption]
        for text in several:
            if not isinstance(text, str) or not text.strip():
                raise RAdapterError(f"row {index + 1} of {spec} has no text in {entry.caption_column!r}: {text!r}")
            texts.setdefault(key, []).append(text)
    keys = [list(first)[index] for index in _drawn(len(first), limit, seed)]
    image_of = np.repeat(np.arange(len(keys)), [len(texts[key]) for key in keys])
    images = [_Image(data, first[key], entry.border) for key in keys]
    return RetrievalSet(entry, images, [text for key in keys for text in texts[key]], image_of)


def _image_key(value: Any) -> str:
    """What rows of the same image share."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class _Image:
    """Reads the bytes of one image of a data set."""

    data: Labelled
    index: int
    border: int

    def __call__(self) -> bytes:
        found = self.data.data(self.data.rows[self.index])
        return _cropped(found, self.border) if self.border else found

    @property
    def name(self) -> str:
        """What to call the image in an error."""
        return self.data.name(self.data.rows[self.index])


def _cropped(data: bytes, border: int) -> bytes:
    image = decode(data)
    out = io.BytesIO()
    image.crop((border, border, image.width - border, image.height - border)).save(out, "PNG")
    return out.getvalue()


def _drawn(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _below(root: Path, spec: str) -> str:
    reader, colon, path = spec.partition(":")
    return f"{reader}:{root / path}" if colon and reader in READERS else spec


def _class_mapping(suite: Suite, classes: str | None) -> dict[str, str] | None:
    """The mapping that `classes` names; None where it is no mapping."""
    if classes == "imagenet":
        from timm.data.imagenet_info import ImageNetInfo

        names = open_clip.IMAGENET_CLASSNAMES
        info = ImageNetInfo("imagenet-1k")
        wordnet = dict(zip(info.label_names(), names, strict=True))  # type: ignore[no-untyped-call]
        return {**wordnet, **{str(index): name for index, name in enumerate(names)}}
    if classes is None or not classes.endswith((".yaml", ".yml")):
        return None
    path = suite.folder / classes
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RAdapterError(f"could not read the classes {path}: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict) or not mapping or not all(split_label(str(name)) for name in mapping.values()):
        raise RAdapterError(f"the classes {path} must map the data's class names to names for prompts")
    return {str(own): str(name) for own, name in mapping.items()}


def _templates(suite: Suite, source: Any) -> list[str] | None:
    if source is None:
        return None
    if isinstance(source, str) and (suite.folder / source).is_file():
        source = str(suite.folder / source)
    return templates_of(source)


def _digest(texts: Sequence[str], numbers: NDArray[np.int64]) -> str:
    content = json.dumps([list(texts), numbers.tolist()], ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
