"""Opening the data sets that a suite names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radapter_serve.clip.prompts import templates_of
from radapter_serve.contract.labels import split_label
from radapter_serve.data import (
    READERS,
    Captioned,
    Labelled,
    Masked,
    class_split,
    imagenet_classes,
    load_captioned,
    load_labelled,
    refuse_wordnet_ids,
    validation_data,
)
from radapter_serve.data.classes import IMAGENET
from radapter_serve.data.held_out import check_held_out
from radapter_serve.data.masked import load_masked
from radapter_serve.data.objectnet import objectnet_members
from radapter_serve.data.proposals import load_proposals
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.evaluation_set import EvaluationSet, drawn
from radapter_serve.evaluation.image_sets import (
    ClassificationSet,
    Image,
    RetrievalSet,
    SeveralLabelsSet,
)
from radapter_serve.evaluation.segmentation import SegmentationSet
from radapter_serve.evaluation.suite import SEVERAL_METRIC, AsTrained, Entry, Suite
from radapter_serve.files import read_yaml

_READERS = (*READERS, "masks", "coco")


def open_set(
    suite: Suite, entry: Entry, *, limit: int | None = None, seed: int = 0
) -> EvaluationSet:
    """Open one data set of a suite.

    Args:
        suite: where it stands.
        entry: the data set.
        limit: images at most, drawn by the seed; None takes all.
        seed: of that draw.

    Raises:
        RAdapterError: the data, a class file or a template file can't be read, or they do not
            match.
    """
    if suite.as_trained is not None:
        return _own_set(suite.as_trained, entry, limit, seed)
    spec = below(suite.data_root, entry.data)
    try:
        if entry.task == "retrieval":
            return _retrieval_set(suite, entry, spec, limit, seed)
        if entry.task == "segmentation":
            return _segmentation_set(suite, entry, spec, limit, seed)
        mapping, members = _class_mapping(suite, entry.classes)
        data = load_labelled(
            spec,
            image_column=entry.image_column,
            label_column=entry.label_column,
            label_separator=entry.label_separator,
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
    return classification_set(
        entry, data, templates, mapping=mapping, members=members, limit=limit, seed=seed
    )


def classification_set(
    entry: Entry,
    data: Labelled,
    templates: list[str] | None = None,
    *,
    mapping: Mapping[str, str] | None = None,
    members: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ClassificationSet:
    """A set of labelled images from an open data set.

    Args:
        entry: what the suite says of it.
        data: from `load_labelled`.
        templates: prompt templates; None takes the model's own.
        mapping: from the data's class names to those for prompts; others are left out.
        members: of each class of the mapping the classes with prompts that it stands for; None asks
            for it itself.
        limit: no more images than this, drawn by `seed`.
        seed: of that draw.
    """
    entry = _with_metric(entry, data)
    number_of, classes, asked = _classes(entry, data, mapping, members)
    sets = data.label_sets()
    labels = [[number_of[label] for label in of if label in number_of] for of in sets]
    chosen = np.flatnonzero([bool(of) for of in labels])
    if not len(chosen):
        present = sorted({data.own[label] for of in sets for label in of})
        raise RAdapterError(
            f"data set {entry.name!r}: no image has one of the classes {', '.join(classes[:5])}; it"
            f" has images of {', '.join(present[:5])}"
        )
    chosen = chosen[drawn(len(chosen), limit, seed)]
    data.exif_orientation = entry.exif_orientation
    images = [Image(data, data.rows, int(index), entry.border) for index in chosen]
    labels = [labels[index] for index in chosen]
    if not data.several:
        single = np.array([of[0] for of in labels], np.int64)
        return ClassificationSet(entry, images, single, list(classes), templates, asked)
    truth = np.zeros((len(labels), len(classes)), bool)
    for row, of in zip(truth, labels, strict=True):
        row[of] = True
    return SeveralLabelsSet(entry, images, truth, list(classes), templates, asked)


def _with_metric(entry: Entry, data: Labelled) -> Entry:
    """The entry, with the metric of images that have several labels where they do."""
    if data.several:
        return dataclasses.replace(entry, metric=SEVERAL_METRIC)
    if entry.metric == SEVERAL_METRIC:
        raise RAdapterError(
            f"data set {entry.name!r}: metric is {SEVERAL_METRIC}, which is for images with several"
            " labels; leave it out, or see label_separator"
        )
    return entry


def _classes(
    entry: Entry,
    data: Labelled,
    mapping: Mapping[str, str] | None,
    members: Mapping[str, Sequence[str]] | None,
) -> tuple[dict[int, int], Sequence[str], list[Sequence[str]]]:
    """The numbers of the data's classes among those that are asked for, these by name, and the
    classes with prompts that each stands for.
    """
    if mapping is None:
        return {index: index for index in range(len(data.classes))}, data.classes, []
    kept = [index for index, name in enumerate(data.own) if name in mapping]
    if not kept:
        raise RAdapterError(
            f"data set {entry.name!r}: the class mapping {entry.classes} knows none of its"
            f" classes: {', '.join(data.own[:5])}, ..."
        )
    return (
        {index: number for number, index in enumerate(kept)},
        [mapping[data.own[index]] for index in kept],
        [members[data.own[index]] for index in kept] if members else [],
    )


def _retrieval_set(
    suite: Suite, entry: Entry, spec: str, limit: int | None, seed: int
) -> RetrievalSet:
    images = _images(suite, entry)
    data = load_captioned(
        spec, image_column=entry.image_column, caption_column=entry.caption_column, images=images
    )
    return retrieval_set(entry, data, limit, seed)


def _own_set(own: AsTrained, entry: Entry, limit: int | None, seed: int) -> EvaluationSet:
    """The validation data of a run, as training opened it."""
    data = validation_data(own.source, own.classes, broken=[])
    assert data is not None  # as own_validation has seen
    if own.held_out is not None and not own.source.val_data:
        check_held_out(data, own.held_out, own.source.data)
    if isinstance(data, Masked):
        images = [data.images[index] for index in drawn(len(data.images), limit, seed)]
        return SegmentationSet(entry, images, data.classes, None)
    if isinstance(data, Captioned):
        return retrieval_set(entry, data, limit, seed)
    return classification_set(entry, data, limit=limit, seed=seed)


def retrieval_set(
    entry: Entry, data: Captioned, limit: int | None = None, seed: int = 0
) -> RetrievalSet:
    """A set of images with captions from an open data set; the arguments are those of
    `classification_set`.
    """
    data.exif_orientation = entry.exif_orientation
    chosen = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    captions = [image.captions[: entry.max_captions] for image in chosen]
    image_of = np.repeat(np.arange(len(chosen)), [len(texts) for texts in captions])
    images = [Image(data, data.table, image.row, entry.border) for image in chosen]
    return RetrievalSet(entry, images, [text for texts in captions for text in texts], image_of)


def _segmentation_set(
    suite: Suite, entry: Entry, spec: str, limit: int | None, seed: int
) -> SegmentationSet:
    data = load_masked(
        spec,
        classes=_file(suite, entry.classes) if entry.classes else None,
        images=_images(suite, entry),
        exif_orientation=entry.exif_orientation,
    )
    images = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    proposals = None
    if entry.proposals is not None:
        labels = len(data.classes) - (entry.background is not None)
        proposals = load_proposals(
            suite.data_root / entry.proposals, [image.name for image in images], labels
        )
        if entry.proposal_weight is not None and not proposals.scored:
            raise RAdapterError(
                f"proposal_weight is {entry.proposal_weight} but {entry.proposals} has no scores to"
                " weigh"
            )
    return SegmentationSet(
        entry, images, data.classes, _templates(suite, entry.templates), proposals
    )


def below(root: Path, spec: str) -> str:
    reader, colon, path = spec.partition(":")
    return f"{reader}:{root / path}" if colon and reader in _READERS else spec


def _images(suite: Suite, entry: Entry) -> Path | None:
    return suite.data_root / entry.images if entry.images else None


def _file(suite: Suite, name: Path) -> Path:
    """A file beside the suite or, where there is none, below the data root."""
    return suite.folder / name if (suite.folder / name).exists() else suite.data_root / name


def _class_mapping(
    suite: Suite, classes: Path | None
) -> tuple[Mapping[str, str] | None, Mapping[str, Sequence[str]] | None]:
    """The mapping that `classes` names, and its members; None where it is no mapping, or has
    none.
    """
    if classes is None:
        return None, None
    if str(classes) == IMAGENET:
        return imagenet_classes(), None
    path = _file(suite, classes)
    if path.is_dir():
        common = objectnet_members(path)
        return {own: name for own, (name, _) in common.items()}, {
            own: of for own, (_, of) in common.items()
        }
    if classes.suffix not in (".yaml", ".yml"):
        return None, None
    mapping = read_yaml(path, "the classes")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(split_label(str(name)) for name in mapping.values())
    ):
        raise RAdapterError(
            f"the classes {path} must map the data's class names to names for prompts"
        )
    return {str(own): str(name) for own, name in mapping.items()}, None


def _templates(suite: Suite, source: Any) -> list[str] | None:
    if source is None:
        return None
    if isinstance(source, str) and (suite.folder / source).is_file():
        source = str(suite.folder / source)
    return templates_of(source)
