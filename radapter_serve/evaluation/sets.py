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
from radapter_serve.data.captions import Captioned
from radapter_serve.data.classes import IMAGENET, imagenet_classes, refuse_wordnet_ids
from radapter_serve.data.labelled import Labelled, class_split
from radapter_serve.data.proposals import load_proposals
from radapter_serve.data.rows import READERS
from radapter_serve.data.runs import Images, check_held_out, open_source, validation_data
from radapter_serve.data.source import with_reader
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import (
    ClassificationSet,
    EvaluationSet,
    Image,
    RetrievalSet,
    drawn,
)
from radapter_serve.evaluation.segmentation import SegmentationSet
from radapter_serve.evaluation.suite import PROPOSALS, SEVERAL_METRIC, Entry, Suite
from radapter_serve.files import read_yaml

_READERS = (*READERS, "masks", "coco")


def open_set(
    suite: Suite, entry: Entry, *, limit: int | None = None, seed: int = 0
) -> EvaluationSet:
    """Open one data set of a suite: at most `limit` images, drawn by the seed; None takes all."""
    run = suite.run
    mapping = None
    data: Images | None
    if run is not None:
        data = validation_data(run.source, run.classes, broken=[])
        assert data is not None  # as own_validation has seen
        if run.held_out is not None and not run.source.val_data:
            check_held_out(data, run.held_out, run.source.data)
    else:
        classes = entry.classes
        try:
            if entry.task == "classification" and str(classes) == IMAGENET:
                mapping = imagenet_classes()
            elif classes is not None:  # next to the suite, else below the data root
                in_suite = suite.folder / classes
                classes = in_suite if in_suite.exists() else suite.data_root / classes
                if entry.task == "classification" and classes.suffix in (".yaml", ".yml"):
                    mapping = _mapping(classes)
            reader, colon, path = entry.data.partition(":")
            below = colon and reader in _READERS
            source = dataclasses.replace(
                entry,
                data=f"{reader}:{suite.data_root / path}" if below else entry.data,
                images=suite.data_root / entry.images if entry.images else None,
                classes=classes if mapping is None else None,
            )
            # The halves are of all classes.
            data = open_source(source, every_class=entry.class_split != "all")
            if isinstance(data, Labelled):
                if classes is None:
                    refuse_wordnet_ids(data.own)
                data = class_split(data, entry.class_split)
        except RAdapterError as error:
            raise RAdapterError(f"data set {entry.name!r}: {error}") from error
    if isinstance(data, Captioned):
        return _retrieval_set(entry, data, limit, seed)
    templates = _templates(suite, entry.templates)
    if isinstance(data, Labelled):
        return _classification_set(entry, data, templates, mapping, limit, seed)

    # Images with masks.
    images = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    proposals = None
    if entry.proposals is not None:
        labels = len(data.classes) - (entry.background is not None)
        names = [image.name for image in images]
        try:
            proposals = load_proposals(suite.data_root / entry.proposals, names, labels)
        except RAdapterError as error:
            raise RAdapterError(f"data set {entry.name!r}: {error}") from error
        if entry.proposal_weight is not None and not proposals.scored:
            raise RAdapterError(
                f"data set {entry.name!r}: proposal_weight is {entry.proposal_weight} but"
                f" {entry.proposals} has no scores to weigh"
            )
    return SegmentationSet(entry, images, data.classes, templates, proposals)


def _classification_set(
    entry: Entry,
    data: Labelled,
    templates: list[str] | None,
    mapping: Mapping[str, str] | None,
    limit: int | None,
    seed: int,
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
    labels = [[number_of[label] for label in row if label in number_of] for row in sets]
    chosen = np.flatnonzero([bool(row) for row in labels])
    if not len(chosen):
        present = sorted({data.own[label] for row in sets for label in row})
        raise RAdapterError(
            f"data set {entry.name!r}: no image has one of the classes {', '.join(classes[:5])}; it"
            f" has images of {', '.join(present[:5])}"
        )
    chosen = chosen[drawn(len(chosen), limit, seed)]
    images = [Image(data, data.rows, int(index), entry.border) for index in chosen]
    if data.several:
        truth = np.zeros((len(chosen), len(classes)), bool)
        for row, index in zip(truth, chosen, strict=True):
            row[labels[index]] = True
    else:
        truth = np.array([labels[index][0] for index in chosen], np.int64)
    return ClassificationSet(entry, images, truth, list(classes), templates)


def _retrieval_set(entry: Entry, data: Captioned, limit: int | None, seed: int) -> RetrievalSet:
    """A set of images with captions from an open data set."""
    chosen = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    captions = [image.captions[: entry.max_captions] for image in chosen]
    image_of = np.repeat(np.arange(len(chosen)), [len(texts) for texts in captions])
    images = [Image(data, data.table, image.row, entry.border) for image in chosen]
    return RetrievalSet(entry, images, [text for texts in captions for text in texts], image_of)


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
    place = source.val_data
    if data is not None:
        place = data = with_reader(data)
        if source.data and _place(data) == _place(source.data):
            raise RAdapterError(
                f"the validation data {data} is what the run was trained with, which tells nothing"
                " of other images; name others, or none, or own for those that the run was"
                " validated with"
            )
    elif not place and source.val_fraction and source.data:
        place = f"{source.val_fraction} of {source.data}"
    if not place:
        raise RAdapterError(
            "alpha is chosen on validation data, and the run was trained without any"
            " (--val-fraction or --val-data); name some in a suite: data sets with `split:"
            " validation`"
        )
    return as_trained(metadata, data, Entry(place, name="validation", split="validation"))


def as_trained(metadata: Metadata, data: str | None, entry: Entry | None = None) -> Suite:
    """Data, such as `photos/test` or `csv:test.csv`, as a suite of one set, opened as a run opened
    its validation data; None is that data itself. The entry is of test data unless it is given.
    """
    if data is not None:
        data = with_reader(data)
        metadata = dataclasses.replace(metadata, recipe={**metadata.recipe, "val_data": data})
        entry = entry or Entry(data, name=data)
    assert entry is not None
    source = metadata.source
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
    return Suite(entry.name, (entry,), run=metadata)


def _place(source: str) -> tuple[str, Path, str]:
    """The reader, the file or folder, and the split that data is read from, however it is
    written.
    """
    reader, _, rest = source.rpartition(":")
    path, _, split = rest.partition("@")
    return reader, Path(path).absolute().resolve(), split or "train"
