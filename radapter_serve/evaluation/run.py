"""Evaluate models on a whole suite, choose α by it, and draw the results."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from radapter_serve import __version__
from radapter_serve.adapter import Metadata, load_adapter
from radapter_serve.data.source import RunSource
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, choose, save_choice
from radapter_serve.evaluation.embedder import PROPOSALS, Embedder, NoSuchWay, Variant
from radapter_serve.evaluation.evaluate import case_of, evaluate
from radapter_serve.evaluation.evaluation_set import EvaluationSet, Known
from radapter_serve.evaluation.plots import (
    plot_alpha_curve,
    plot_bars,
    plot_calibration,
    plot_confusion,
)
from radapter_serve.evaluation.results import (
    KEPT,
    Results,
    by_shift,
    common_unit,
    curve,
    harmonic_means,
    mean_kept,
    model_name,
    own_metric,
)
from radapter_serve.evaluation.row import Row
from radapter_serve.evaluation.sets import open_set
from radapter_serve.evaluation.suite import AsTrained, Entry, Suite

Say = Callable[[str], None]
# Of what is at several α, the first has the curve.
_SOURCES = ("adapter", "checkpoint", "lora", "release", "server")


def evaluate_suite(
    embedder: Embedder,
    suite: Suite,
    results: Results,
    *,
    split: str = "test",
    variants: Sequence[Variant] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    say: Say | None = None,
    skip: Say | None = None,
    opened: Callable[[EvaluationSet], None] | None = None,
) -> list[Row]:
    """Evaluate models on the data sets of one split of a suite; rows that `results` has are not
    made again.

    Where a suite has both the base and the novel classes of a data set, a row of their harmonic
    mean is added to the results.

    Args:
        embedder: holds the models.
        suite: from `load_suite`.
        results: takes the rows, data set by data set.
        split: `test` or `validation`.
        variants: which of the embedder's models; all if None.
        limit: images of a data set at most, drawn by the seed; None takes all.
        seed: of that draw.
        batch_size: images a pass.
        say: called with a line about the progress.
        skip: called with a line about a data set that these models can't be evaluated on; if None,
            that is an error.
        opened: called with each data set that they are evaluated on.

    Returns:
        The rows, data set by data set.
    """
    say = say or (lambda line: None)
    chosen = embedder.variants if variants is None else variants
    rows: list[Row] = []
    known: dict[Any, Known] = {}
    for entry in suite.of_split(split):
        say(f"{entry.name}: reading {entry.data}")
        data = open_set(suite, entry, limit=limit, seed=seed)
        stamp = partial(dataclasses.replace, suite=suite.name, seed=seed, version=__version__)
        try:
            cases = [stamp(case_of(embedder, data, variant)) for variant in chosen]
        except NoSuchWay as error:
            if skip is None:
                raise
            skip(f"{entry.name} is left out: {error}")
            continue
        if opened:
            opened(data)
        # What is kept of the base is measured beside alpha 0, which it is compared with.
        keeps = bool(data.nouns) and any(variant.alpha == 0.0 for variant in chosen)
        missing = []
        for variant, of in zip(chosen, cases, strict=True):
            row = results.find(of)
            if row is None or (keeps and KEPT not in row.metrics):
                missing.append(variant)
        if missing:
            if keeps:
                missing = [of for of in chosen if of in missing or of.alpha == 0.0]
            models = f"{len(missing)} model{'s' if len(missing) > 1 else ''}"
            say(f"{entry.name}: embedding its texts by {models}")
            made = evaluate(
                embedder,
                data,
                missing,
                batch_size=batch_size,
                known=known,
                kept=keeps,
                progress=lambda done, n, name=entry.name, by=models: say(
                    f"{name}: {done} of {n} images by {by}"
                ),  # type: ignore[misc]
            )
            results.add(stamp(row) for row in made)
        rows += [row for of in cases if (row := results.find(of)) is not None]
    means = [row for row in harmonic_means(rows, suite.pairs(split)) if results.find(row) is None]
    if means:
        results.add(means)
    return rows


def choose_alpha(
    embedder: Embedder, adapter: str | Path, suite: Suite | None, results: Results, **options: Any
) -> tuple[Choice, Path]:
    """Choose α on validation data, and write the choice beside the adapter.

    Args:
        embedder: from `from_adapter`, with every α that may be chosen, the adapter's own among
            them.
        adapter: adapter file, or the folder of a run.
        suite: its validation sets are used; where it has none, the validation data that the run was
            trained with.
        results: takes the rows.
        options: of `evaluate_suite`.

    Returns:
        The choice, and the file that it was written to.

    Raises:
        RAdapterError: there is no validation data.
    """
    metadata = load_adapter(adapter).metadata
    if suite is None or not suite.of_split("validation"):
        suite = own_validation(metadata)
    variants = [variant for variant in embedder.variants if variant.source == "adapter"]
    rows = evaluate_suite(
        embedder, suite, results, split="validation", variants=variants, **options
    )
    choice = choose(rows, metadata.alpha)
    return choice, save_choice(choice, adapter)


def draw_choice(choice: Choice, folder: Path) -> Path:
    """Draw the curve on validation data that an α was chosen from, as `validation.png`; returns its
    path.

    Args:
        choice: from `choose_alpha`.
        folder: for the picture.
    """
    path = folder / "validation.png"
    unit = common_unit(of.metric for of in choice.sets.values())
    plot_alpha_curve(
        choice.curve,
        *by_shift(choice.sets),
        path,
        title=f"validation\nauto: α = {choice.alpha:g}, best: {choice.best:g}",
        unit=unit,
        kept={of["alpha"]: of[KEPT] for of in choice.curve if KEPT in of},
    )
    return path


def draw(rows: Sequence[Row], folder: Path, title: str, *, curve_too: bool = True) -> list[Path]:
    """Draw what the rows of one call allow.

    `bars.png` always; `alpha.png` where there are several α of one source, one each for dense
    segmentation and proposals; by the last model `confusion-NAME.png` of each data set of few
    classes, and `calibration-NAME.png` of each data set of labelled images.

    Args:
        rows: from `evaluate_suite`.
        folder: for the pictures.
        title: above them.
        curve_too: False leaves `alpha.png` as it is.

    Returns:
        The pictures' paths.
    """
    unit = common_unit(row.metric for row in rows)
    pictures = [_draw_bars(rows, folder, title, unit)]
    if curve_too:
        pictures += _draw_curves(rows, folder, title, unit)
    return pictures + _draw_details(rows, folder)


def _draw_bars(rows: Sequence[Row], folder: Path, title: str, unit: str) -> Path:
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        name = model_name(row.source, row.alpha, ", α = ")
        bars.setdefault(name, {})[row.dataset] = own_metric(row)
    path = folder / "bars.png"
    plot_bars(bars, path, title=title, unit=unit)
    return path


def _draw_curves(rows: Sequence[Row], folder: Path, title: str, unit: str) -> list[Path]:
    ways: dict[str, list[Row]] = {}
    for row in rows:
        ways.setdefault("proposals" if row.dense == PROPOSALS else "dense", []).append(row)
    pictures = []
    for way, some in ways.items():
        lines = {source: curve([r for r in some if r.source == source]) for source in _SOURCES}
        source = next((source for source in _SOURCES if len(lines[source]) > 1), None)
        if source is None:
            continue
        line = lines[source]
        kept = {
            point["alpha"]: mean_kept(
                row for row in some if (row.source, row.alpha) == (source, point["alpha"])
            )
            for point in line
        }
        wise_ft = curve([row for row in some if row.source == "wise-ft"])
        path = folder / ("alpha.png" if len(ways) == 1 else f"alpha-{way}.png")
        plot_alpha_curve(
            line,
            *by_shift({row.dataset: row for row in some}),
            path,
            title=title,
            beside={"WiSE-FT": wise_ft} if wise_ft else None,
            unit=unit,
            kept={alpha: share for alpha, share in kept.items() if share is not None},
        )
        pictures.append(path)
    return pictures


def _draw_details(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Of each data set by the last model that has them: what was taken for what, and how sure it
    was.
    """
    confused = {row.dataset: row for row in rows if row.confusion is not None}
    calibrated = {row.dataset: row for row in rows if row.calibration is not None}
    pictures = []
    for kind, last, plot in (
        ("confusion", confused, plot_confusion),
        ("calibration", calibrated, plot_calibration),
    ):
        for dataset, row in last.items():
            name = re.sub(r"[^\w.-]+", "_", dataset)
            pictures.append(folder / f"{kind}-{name}.png")
            plot(row, pictures[-1])
    return pictures


def own_validation(metadata: Metadata, data: str | None = None) -> Suite:
    """Validation data of a run as a suite of one set, opened as training opened its own.

    Args:
        metadata: of the run's adapter.
        data: other data of the same columns; None takes what the run was validated with.

    Raises:
        RAdapterError: the run was trained without any, or with the other data.
    """
    source = metadata.source
    if data is not None:
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
    """Test data as a suite of one set, opened as a run opened its validation data.

    Args:
        metadata: of the run's adapter.
        data: of the run's task and columns, such as `imagefolder:photos/test`.
    """
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
