"""Opening the data sets that a suite names, and those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from radapter_serve.adapter import Metadata
from radapter_serve.clip.prompts import templates_of
from radapter_serve.contract.labels import split_label
from radapter_serve.data.captions import Captioned, load_captioned
from radapter_serve.data.classes import IMAGENET, imagenet_classes, refuse_wordnet_ids
from radapter_serve.data.labelled import Labelled, class_split, load_labelled
from radapter_serve.data.masks import Masked, load_masked
from radapter_serve.data.proposals import load_proposals
from radapter_serve.data.rows import READERS
from radapter_serve.data.runs import check_held_out, validation_data
from radapter_serve.data.source import RunSource, with_reader
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import (
    ClassificationSet,
    EvaluationSet,
    Image,
    RetrievalSet,
    SeveralLabelsSet,
    drawn,
)
from radapter_serve.evaluation.segmentation import SegmentationSet
from radapter_serve.evaluation.suite import PROPOSALS, SEVERAL_METRIC, AsTrained, Entry, Suite
from radapter_serve.files import read_yaml

_READERS = (*READERS, "masks", "coco")


def open_set(
    suite: Suite, entry: Entry, *, limit: int | None = None, seed: int = 0
) -> EvaluationSet:
    """Open one data set of a suite: at most `limit` images, drawn by the seed; None takes all."""
    own = suite.as_trained
    if own is not None:
        data = validation_data(own.source, own.classes, broken=[])
        assert data is not None  # as own_validation has seen
        if own.held_out is not None and not own.source.val_data:
            check_held_out(data, own.held_out, own.source.data)
        if isinstance(data, Masked):
            return _segmentation_set(suite, entry, data, limit, seed)
        if isinstance(data, Captioned):
            return retrieval_set(entry, data, limit, seed)
        return classification_set(entry, data, limit=limit, seed=seed)

    spec = below(suite.data_root, entry.data)
    images = suite.data_root / entry.images if entry.images else None
    classes = entry.classes
    if classes and str(classes) != IMAGENET:  # next to the suite, else below the data root
        in_suite = suite.folder / classes
        classes = in_suite if in_suite.exists() else suite.data_root / classes
    try:
        if entry.task == "retrieval":
            captioned = load_captioned(
                spec,
                image_column=entry.image_column,
                caption_column=entry.caption_column,
                images=images,
            )
            return retrieval_set(entry, captioned, limit, seed)
        if entry.task == "segmentation":
            masked = load_masked(
                spec, classes=classes, images=images, exif_orientation=entry.exif_orientation
            )
            return _segmentation_set(suite, entry, masked, limit, seed)
        mapping = None
        if classes and str(classes) == IMAGENET:
            mapping = imagenet_classes()
        elif classes and classes.suffix in (".yaml", ".yml"):
            mapping = _mapping(classes)
        labelled = load_labelled(
            spec,
            image_column=entry.image_column,
            label_column=entry.label_column,
            label_separator=entry.label_separator,
            classes=classes if mapping is None else None,
            images=images,
            every_class=entry.class_split != "all",  # the halves are of all classes
        )
        if classes is None:
            refuse_wordnet_ids(labelled.own)
        labelled = class_split(labelled, entry.class_split)
    except RAdapterError as error:
        raise RAdapterError(f"data set {entry.name!r}: {error}") from error
    templates = _templates(suite, entry.templates)
    return classification_set(entry, labelled, templates, mapping=mapping, limit=limit, seed=seed)


def classification_set(
    entry: Entry,
    data: Labelled,
    templates: list[str] | None = None,
    *,
    mapping: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ClassificationSet:
    """A set of labelled images from an open data set; `mapping` from the data's class names to
    those for prompts leaves other classes out.
    """
    # Images that have several labels always have one metric, and others never.
    if data.several:
        entry = dataclasses.replace(entry, metric=SEVERAL_METRIC)
    elif entry.metric == SEVERAL_METRIC:
        raise RAdapterError(
            f"data set {entry.name!r}: metric is {SEVERAL_METRIC}, which is for images with several"
            " labels; leave it out, or see label_separator"
        )

    # Classes: all, or those that the mapping knows.
    numbers = range(len(data.classes))
    classes = data.classes
    if mapping is not None:
        kept = [index for index in numbers if data.own[index] in mapping]
        if not kept:
            raise RAdapterError(
                f"data set {entry.name!r}: the class mapping {entry.classes} knows none of its"
                f" classes: {', '.join(data.own[:5])}, ..."
            )
        classes = [mapping[data.own[index]] for index in kept]
        number_of = {index: number for number, index in enumerate(kept)}
    else:
        number_of = {index: index for index in numbers}

    # Images that have one of these classes.
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
        return ClassificationSet(entry, images, single, list(classes), templates)
    truth = np.zeros((len(labels), len(classes)), bool)
    for row, of in zip(truth, labels, strict=True):
        row[of] = True
    return SeveralLabelsSet(entry, images, truth, list(classes), templates)


def retrieval_set(
    entry: Entry, data: Captioned, limit: int | None = None, seed: int = 0
) -> RetrievalSet:
    """A set of images with captions from an open data set."""
    data.exif_orientation = entry.exif_orientation
    chosen = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    captions = [image.captions[: entry.max_captions] for image in chosen]
    image_of = np.repeat(np.arange(len(chosen)), [len(texts) for texts in captions])
    images = [Image(data, data.table, image.row, entry.border) for image in chosen]
    return RetrievalSet(entry, images, [text for texts in captions for text in texts], image_of)


def _segmentation_set(
    suite: Suite, entry: Entry, data: Masked, limit: int | None, seed: int
) -> SegmentationSet:
    images = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    proposals = None
    if entry.proposals is not None:
        labels = len(data.classes) - (entry.background is not None)
        names = [image.name for image in images]
        proposals = load_proposals(suite.data_root / entry.proposals, names, labels)
        if entry.proposal_weight is not None and not proposals.scored:
            raise RAdapterError(
                f"proposal_weight is {entry.proposal_weight} but {entry.proposals} has no scores to"
                " weigh"
            )
    templates = _templates(suite, entry.templates)
    return SegmentationSet(entry, images, data.classes, templates, proposals)


def below(root: Path, spec: str) -> str:
    """The data that a suite names, its path below the data root."""
    reader, colon, path = spec.partition(":")
    return f"{reader}:{root / path}" if colon and reader in _READERS else spec


def _mapping(path: Path) -> dict[str, str]:
    """From the data's own class names to names for prompts."""
    mapping = read_yaml(path, "the classes")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(split_label(str(name)) for name in mapping.values())
    ):
        raise RAdapterError(
            f"the classes {path} must map the data's class names to names for prompts"
        )
    return {str(own): str(name) for own, name in mapping.items()}


def _templates(suite: Suite, source: Any) -> list[str] | None:
    if source is None:
        return None
    if isinstance(source, str) and (suite.folder / source).is_file():
        source = str(suite.folder / source)
    return templates_of(source)


def own_validation(metadata: Metadata, data: str | None = None) -> Suite:
    """Validation data of a run as a suite of one set, opened as training opened it; `data` is other
    data of the same columns, which the run must not have been trained with.
    """
    source = metadata.source
    if data is not None:
        data = with_reader(data)
        if source.data and _place(data) == _place(source.data):
            raise RAdapterError(
                f"the validation data {data} is what the run was trained with, which tells nothing"
                " of other images; name others, or none, or own for those that the run was"
                " validated with"
            )
        source = dataclasses.replace(source, val_data=data)
    place = source.val_data
    if not place and source.val_fraction and source.data:
        place = f"{source.val_fraction} of {source.data}"
    if not place:
        raise RAdapterError(
            "alpha is chosen on validation data, and the run was trained without any"
            " (--val-fraction or --val-data); name some in a suite: data sets with `split:"
            " validation`"
        )
    return _as_trained(metadata, source, Entry(place, name="validation", split="validation"))


def as_trained(metadata: Metadata, data: str) -> Suite:
    """Test data, such as `photos/test` or `csv:test.csv`, as a suite of one set, opened as a run
    opened its validation data.
    """
    data = with_reader(data)
    source = dataclasses.replace(metadata.source, val_data=data)
    return _as_trained(metadata, source, Entry(data, name=data))


def _as_trained(metadata: Metadata, source: RunSource, entry: Entry) -> Suite:
    dense = None
    if source.task == "segmentation":
        dense = PROPOSALS if source.dense == "none" else source.dense
    entry = dataclasses.replace(
        entry,
        task=source.task,
        metric="",  # the task's own
        class_split=source.class_split,
        exif_orientation=source.exif_orientation,
        dense=dense,
    )
    own = AsTrained(source, metadata.classes, metadata.held_out)
    return Suite(entry.name, (entry,), as_trained=own)


def _place(source: str) -> tuple[str, Path, str]:
    """The reader, the file or folder, and the split that data is read from, however it is
    written.
    """
    reader, _, rest = source.rpartition(":")
    path, _, split = rest.partition("@")
    return reader, Path(path).absolute().resolve(), split or "train"
