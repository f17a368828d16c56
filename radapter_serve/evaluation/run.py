"""Evaluation of models on a data set or a suite; opening of the data sets of a suite or a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from radapter_serve.adapter import Metadata
from radapter_serve.clip.towers import templates_of
from radapter_serve.contract.labels import split_label
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import (
    IMAGENET,
    Labelled,
    class_split,
    imagenet_classes,
    refuse_wordnet_ids,
)
from radapter_serve.data.proposals import Proposals
from radapter_serve.data.rows import READERS
from radapter_serve.data.runs import Images, check_held_out, open_source, validation_data
from radapter_serve.data.source import with_reader
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import (
    Answers,
    ClassificationSet,
    EvaluationSet,
    ImageOfRow,
    RetrievalSet,
    SegmentationSet,
    drawn,
)
from radapter_serve.evaluation.metrics import wilson
from radapter_serve.evaluation.models import Candidate
from radapter_serve.evaluation.rows import KEPT_METRIC, Results, Row
from radapter_serve.evaluation.suite import PROPOSALS, SEVERAL_METRIC, Entry, Suite
from radapter_serve.files import read_yaml
from radapter_serve.version import __version__

_READERS_OF_PATHS = (*READERS, "masks", "coco")


def evaluate_set(
    models: Sequence[Candidate],
    data: EvaluationSet,
    *,
    batch_size: int = 64,
    say: Callable[[str], None] = lambda line: None,
    keep: Sequence[str] = (),
) -> list[tuple[Row, Answers]]:
    """Evaluate models that prepare images the same way on one data set. `keep` may have "nouns", to
    measure `kept` (see `Row`) against the first model of alpha 0, and "scores".
    """
    seconds = [0.0] * len(models)
    parts: list[list[Answers]] = [[] for _ in models]

    @contextmanager
    def turn(number: int) -> Iterator[None]:
        """Add to a model's seconds; an error names the model and the data set."""
        start = time.perf_counter()
        try:
            yield
        except RAdapterError as error:
            name = models[number].name
            raise RAdapterError(f"data set {data.entry.name!r}, {name}: {error}") from error
        seconds[number] += time.perf_counter() - start

    # Each batch of images goes to every model.
    by = models[0].name if len(models) == 1 else f"{len(models)} models"
    say(f"{data.entry.name}: embedding its texts with {by}")
    done = 0
    for items in _batches(models[0], data, min(batch_size, data.most or batch_size)):
        for number, model in enumerate(models):
            with turn(number):
                parts[number].append(data.answer(model, done, items, keep))
        done += len(items)
        say(f"{data.entry.name}: {done} of {len(data)} images with {by}")

    # A row for each model.
    answers = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in parts
    ]
    rows = []
    for number, model in enumerate(models):
        with turn(number):
            measured = data.measure(model, answers[number])
        row = replace(data.row(model), **measured, runtime=round(seconds[number], 3))
        if "nouns" in keep:
            base = next(place for place, other in enumerate(models) if other.alpha == 0.0)
            same = answers[number]["nouns"] == answers[base]["nouns"]
            share = float(same.mean())
            row = replace(
                row,
                metrics={**row.metrics, KEPT_METRIC: share},
                intervals={**(row.intervals or {}), KEPT_METRIC: wilson(share, len(same))},
            )
        rows.append(row)
    return list(zip(rows, answers, strict=True))


def _batches(model: Candidate, data: EvaluationSet, batch_size: int) -> Iterator[list[Any]]:
    """Yield batches of prepared images; the next batch is read and decoded meanwhile."""

    def item(number: int) -> Any:
        try:
            return data.prepare(model, number)
        except RAdapterError as error:
            raise RAdapterError(
                f"data set {data.entry.name!r}, {data.images[number].name}: {error}"
            ) from error

    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        numbers = iter(range(len(data)))
        ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
        try:
            while ahead:
                now = ahead
                ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
                yield [future.result() for future in now]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def evaluate_suite(
    models: Sequence[Candidate],
    suite: Suite,
    results: Results,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    say: Callable[[str], None] = lambda line: None,
    opened: Callable[[EvaluationSet], None] = lambda data: None,
    base: Candidate | None = None,
) -> list[Row]:
    """Evaluate models on the sets of one split, except rows that `results` has already. `opened` is
    called with each set; `base` is for `kept` (see `Row`), and has no row.
    """
    rows: list[Row] = []
    base = next((model for model in models if model.alpha == 0.0), base)
    for entry in suite.of_split(split):
        say(f"{entry.name}: reading {entry.data}")
        data = open_set(suite, entry, limit=limit, seed=seed)
        stamp: dict[str, Any] = {"suite": suite.name, "seed": seed, "version": __version__}
        cases = [replace(data.row(model), **stamp) for model in models]
        opened(data)
        keep = ["nouns"] if data.nouns and base else []
        missing = []
        for model, case in zip(models, cases, strict=True):
            row = results.find(case)
            if row is None or (keep and KEPT_METRIC not in row.metrics):
                missing.append(model)
        if missing:
            wanted = missing
            if keep and base and base not in missing:  # again, to compare with its answers
                wanted = [base, *missing]
            new = evaluate_set(wanted, data, batch_size=batch_size, say=say, keep=keep)
            pairs = zip(wanted, new, strict=True)
            results.add(replace(row, **stamp) for model, (row, _) in pairs if model in models)
        rows += [row for case in cases if (row := results.find(case)) is not None]
    return rows


def warn_of_overlap(
    choosing: Iterable[EvaluationSet], testing: Iterable[EvaluationSet]
) -> list[str]:
    """A warning for each test set that shares image files with the validation sets."""
    set_of = {digest: data.entry.name for data in choosing for digest in data.contents}
    warnings = []
    for data in testing:
        sets = [set_of[digest] for digest in data.contents if digest in set_of]
        if sets:
            warnings.append(
                f"{data.entry.name}: warning: {len(sets)} of its {len(data)} images are validation"
                f" images of {', '.join(sorted(set(sets)))} too; the figures of what they chose"
                " are too high"
            )
    return warnings


def open_set(
    suite: Suite, entry: Entry, *, limit: int | None = None, seed: int = 0
) -> EvaluationSet:
    """Open one data set of a suite, with at most `limit` images, drawn with the seed."""
    mapping = None
    if suite.run is not None:
        data = _open_as_trained(suite.run)
    else:
        data, mapping = _open_entry(suite, entry)

    # Images with captions.
    if isinstance(data, Captioned):
        chosen = [data.images[index] for index in drawn(len(data.images), limit, seed)]
        captions = [image.captions[: entry.max_captions] for image in chosen]
        image_of = np.repeat(np.arange(len(chosen)), [len(texts) for texts in captions])
        of_rows = [ImageOfRow(data, data.table, image.row) for image in chosen]
        return RetrievalSet(
            entry, of_rows, [text for texts in captions for text in texts], image_of
        )

    # Images with labels.
    templates = None
    if entry.templates is not None:
        place = suite.folder / entry.templates if isinstance(entry.templates, str) else None
        templates = templates_of(str(place) if place and place.is_file() else entry.templates)
    if isinstance(data, Labelled):
        return _classification_set(entry, data, templates, mapping, limit, seed)

    # Images with masks.
    images = [data.images[index] for index in drawn(len(data.images), limit, seed)]
    proposals = None
    if entry.proposals is not None:
        labels = len(data.classes) - (entry.background is not None)
        names = [image.name for image in images]
        try:
            proposals = Proposals(suite.data_root / entry.proposals, names, labels)
        except RAdapterError as error:
            raise RAdapterError(f"data set {entry.name!r}: {error}") from error
        if entry.proposal_weight is not None and not proposals.scored:
            raise RAdapterError(
                f"data set {entry.name!r}: proposal_weight is {entry.proposal_weight} but"
                f" {entry.proposals} has no scores to weigh"
            )
    return SegmentationSet(entry, images, data.classes, templates, proposals)


def _open_as_trained(run: Metadata) -> Images:
    """Open a run's validation data as in its training."""
    source = run.source
    try:
        data = validation_data(source, run.classes, broken=[])
    except RAdapterError as error:
        # A run names its data relative to the folder where it was trained.
        reader, _, path = (source.val_data or source.data).partition(":")
        places = [source.images, source.classes]
        if reader in _READERS_OF_PATHS and "://" not in path:
            places.append(Path(path.partition("@")[0]))
        if any(place and not (place.is_absolute() or place.exists()) for place in places):
            raise RAdapterError(
                f"{error}. A run's data is named relative to the folder where it was trained,"
                f" and was looked for in {Path.cwd()}: start there, or name other data with"
                " --validation of radapter-export or --suite of radapter-eval"
            ) from error
        raise
    assert data is not None  # own_validation has checked it
    if run.held_out is not None and not source.val_data:
        check_held_out(data, run.held_out, source.data)
    return data


def _open_entry(suite: Suite, entry: Entry) -> tuple[Images, Mapping[str, str] | None]:
    """Open the data of a suite's entry, whose paths start from the suite's folder or the data root;
    also returns the mapping of its classes, if it has one.
    """
    mapping = None
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
        is_path = colon and reader in _READERS_OF_PATHS
        source = replace(
            entry,
            data=f"{reader}:{suite.data_root / path}" if is_path else entry.data,
            images=suite.data_root / entry.images if entry.images else None,
            classes=classes if mapping is None else None,
        )
        # `class_split` takes half of all classes, with and without images.
        data = open_source(source, every_class=entry.class_split != "all")
        if isinstance(data, Labelled):
            if classes is None:
                refuse_wordnet_ids(data.keys)
            data = class_split(data, entry.class_split)
    except RAdapterError as error:
        raise RAdapterError(f"data set {entry.name!r}: {error}") from error
    return data, mapping


def _classification_set(
    entry: Entry,
    data: Labelled,
    templates: list[str] | None,
    mapping: Mapping[str, str] | None,
    limit: int | None,
    seed: int,
) -> ClassificationSet:
    """Make a classification set from labelled images. `mapping`, from the data's class names to
    names for prompts, leaves other classes out.
    """
    # Only images with several labels are measured by mAP, and they always are.
    if data.several:
        entry = replace(entry, metric=SEVERAL_METRIC)
    elif entry.metric == SEVERAL_METRIC:
        raise RAdapterError(
            f"data set {entry.name!r}: metric is {SEVERAL_METRIC}, which is for images with several"
            " labels; leave it out, or see label_separator"
        )

    # Keep all classes, or the classes of the mapping.
    kept = [index for index, key in enumerate(data.keys) if mapping is None or key in mapping]
    if not kept:
        raise RAdapterError(
            f"data set {entry.name!r}: the class mapping {entry.classes} knows none of its"
            f" classes: {', '.join(data.keys[:5])}, ..."
        )
    classes = data.classes if mapping is None else [mapping[data.keys[index]] for index in kept]
    number_of = {index: number for number, index in enumerate(kept)}

    # Keep images that have one of these classes.
    sets = data.label_sets()
    labels = [[number_of[label] for label in row if label in number_of] for row in sets]
    chosen = np.flatnonzero([bool(row) for row in labels])
    if not len(chosen):
        present = sorted({data.keys[label] for row in sets for label in row})
        raise RAdapterError(
            f"data set {entry.name!r}: no image has one of the classes {', '.join(classes[:5])}; it"
            f" has images of {', '.join(present[:5])}"
        )
    chosen = chosen[drawn(len(chosen), limit, seed)]
    images = [ImageOfRow(data, data.rows, int(index)) for index in chosen]
    if data.several:
        truth = np.zeros((len(chosen), len(classes)), bool)
        for row, index in zip(truth, chosen, strict=True):
            row[labels[index]] = True
    else:
        truth = np.array([labels[index][0] for index in chosen], np.int64)
    return ClassificationSet(entry, images, truth, list(classes), templates)


def _mapping(path: Path) -> dict[str, str]:
    """Read a mapping from the data's class names to names for prompts."""
    mapping = read_yaml(path, "the classes")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(split_label(str(name)) for name in mapping.values())
    ):
        raise RAdapterError(
            f"the classes {path} must map the data's class names to names for prompts"
        )
    return {str(folder): str(name) for folder, name in mapping.items()}


def own_validation(metadata: Metadata, data: str | None = None) -> Suite:
    """The suite that α is chosen on if the user names no suite: the run's validation data, opened
    as in training; or `data` with the same columns, which must not be the training data.
    """
    source = metadata.source
    place = source.val_data
    if data is not None:
        place = data = with_reader(data)
        if source.data and _place(data) == _place(source.data):
            raise RAdapterError(
                f"the validation data {data} is what the run was trained with, so figures on it say"
                " nothing about other images; name other data, or none, or own for the data that"
                " the run was validated with"
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
    """A suite of one data set, such as `photos/test` or `csv:test.csv`, opened as the run opened
    its validation data; None is the validation data. `entry` defaults to test data.
    """
    if data is not None:
        data = with_reader(data)
        metadata = replace(metadata, recipe={**metadata.recipe, "val_data": data})
        entry = entry or Entry(data, name=data)
    assert entry is not None
    source = metadata.source
    dense = None
    if source.task == "segmentation":
        dense = PROPOSALS if source.dense == "none" else source.dense
    entry = replace(
        entry,
        task=source.task,
        metric="",  # the task's default
        class_split=source.class_split,
        exif_orientation=source.exif_orientation,
        dense=dense,
    )
    return Suite(entry.name, (entry,), run=metadata)


def _place(source: str) -> tuple[str, Path, str]:
    """Reader, absolute path and split of a data source, equal for all spellings of the source."""
    reader, _, rest = source.rpartition(":")
    path, _, split = rest.partition("@")
    return reader, Path(path).absolute().resolve(), split or "train"
