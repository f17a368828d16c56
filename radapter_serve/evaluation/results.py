"""Rows of results: the file that they stand in, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rich.table import Table

from radapter_serve.contract.probabilities import SAME
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.row import Case, Row
from radapter_serve.files import staged

FILE = "results.jsonl"
KEPT = "kept"  # of metrics; see `Measured`


class Shifted(Protocol):
    """A data set, or what was measured on one."""

    @property
    def shift(self) -> str:
        """`id` or `ood`."""


class Scored(Protocol):
    """What was measured on a data set."""

    @property
    def metric(self) -> str:
        """The metric that the data set is reported by."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Shares in [0, 1] by name."""


class Results:
    """`results.jsonl` in a folder: one row a line; after each `add` the file is whole.

    Args:
        folder: made with the first row.
        resume: keep the rows that are there; else the first row replaces them.

    Attributes:
        rows: those that were there and those that were added.
        measured: how many were added.

    Raises:
        RAdapterError: the folder is a file, or the rows that are there can't be read.
    """

    def __init__(self, folder: str | Path, *, resume: bool = True) -> None:
        self.path = Path(folder) / FILE
        self.rows: list[Row] = []
        self.measured = 0
        for place in (Path(folder), *Path(folder).parents):
            if place.exists() and not place.is_dir():
                raise RAdapterError(
                    f"{place} is no folder; name another place for the results with --out"
                )
        if resume and self.path.exists():
            self.rows = _read(self.path)

    def find(self, case: Case) -> Row | None:
        """The row of this case."""
        identity = case.identity
        return next((row for row in self.rows if row.identity == identity), None)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, in place of those of the same case, and write the file."""
        new = list(rows)
        cases = {row.identity for row in new}
        self.rows = [row for row in self.rows if row.identity not in cases] + new
        self.measured += len(new)
        lines = "".join(f"{json.dumps(row.to_dict(), ensure_ascii=False)}\n" for row in self.rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with staged(self.path) as part:
                part.write_text(lines, encoding="utf-8")
        except OSError as error:
            raise RAdapterError(f"could not write {self.path}: {error.strerror}") from error


def own_metric(row: Scored) -> float:
    """The metric that the data set is reported by, in per cent."""
    return 100 * row.metrics[row.metric]


def mean_kept(rows: Iterable[Row]) -> float | None:
    """The mean of `kept` over the data sets that have it, in per cent; None where none has."""
    found = [100 * row.metrics[KEPT] for row in rows if KEPT in row.metrics]
    return sum(found) / len(found) if found else None


def by_shift(sets: Mapping[str, Shifted]) -> tuple[list[str], list[str]]:
    """Names of the data sets in distribution, and of the shifted ones."""
    ids, ood = ([name for name, of in sets.items() if of.shift == shift] for shift in ("id", "ood"))
    return ids, ood


def model_name(source: str, alpha: float | None, joint: str = " at alpha ") -> str:
    """A model as messages and pictures name it."""
    return source if alpha is None else f"{source}{joint}{alpha:g}"


def curve(rows: Sequence[Row]) -> list[dict[str, float]]:
    """For each α, ascending, the set's own metric in per cent by the name of the set, and `alpha`.

    Args:
        rows: of one source; those without an α have no place on it.
    """
    points: dict[float, dict[str, float]] = {}
    for row in rows:
        if row.alpha is not None:
            points.setdefault(row.alpha, {"alpha": row.alpha})[row.dataset] = own_metric(row)
    return [points[alpha] for alpha in sorted(points)]


def metric_name(metric: str) -> str:
    """A metric as papers name it: `mIoU`, `image R@1` (images found by a text), ..."""
    names = {
        "miou": "mIoU",
        "pixel_accuracy": "pixel acc",
        "mean_class_accuracy": "mean acc",
        "harmonic_mean": "H",
        "mean_average_precision": "mAP",
    }
    return names.get(metric, metric.replace("_retrieval_recall", " R"))


def common_unit(metrics: Iterable[str]) -> str:
    """The unit of figures of these metrics: such as `mIoU, %`, or `%` where they differ."""
    names = {metric_name(metric) for metric in metrics}
    return f"{names.pop()}, %" if len(names) == 1 else "%"


def harmonic_means(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """A row for each model and each data set that it was evaluated on by base and by novel classes.

    Args:
        rows: of any models and data sets.
        pairs: names of the sets of base and of novel classes.
    """
    found = {(row.dataset, row.source, row.alpha): row for row in rows}
    means = []
    for base, novel in pairs:
        for (name, source, alpha), row in found.items():
            other = found.get((novel, source, alpha))
            if name == base and other is not None:
                means.append(_harmonic_mean(row, other))
    return means


def _harmonic_mean(base: Row, novel: Row) -> Row:
    values = {"base": base.metrics[base.metric], "novel": novel.metrics[novel.metric]}
    return replace(
        base,
        dataset=f"{base.dataset} and {novel.dataset}",
        metric="harmonic_mean",
        n=base.n + novel.n,
        classes=None,
        class_split=None,
        set_digest=f"{base.set_digest} {novel.set_digest}",
        metrics={**values, "harmonic_mean": harmonic(*values.values())},
        intervals=None,
        calibration=None,
        per_class=None,
        confusion=None,
        indistinguishable=None,
        right=None,
        runtime=round(base.runtime + novel.runtime, 3),
    )


def harmonic(*values: float) -> float:
    """The harmonic mean; 0 where a value is."""
    return len(values) / sum(1 / value for value in values) if all(values) else 0.0


def table(rows: Sequence[Row], title: str, pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Models down, data sets across, with number of images, intervals of 95 % and calibration
    errors; per cent.

    Means are over sets in or out of distribution that are measured alike: by one metric and one way
    of segmentation. What is kept of the base is the mean over the sets that have it.

    Args:
        rows: of any sources and data sets.
        title: above the table.
        pairs: names of the sets of base and of novel classes; H is the harmonic mean of their two
            means.
    """
    # In distribution first.
    sets = {row.dataset: row for row in sorted(rows, key=lambda row: row.shift)}
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, row in sets.items():
        kinds.setdefault(_kind(row), []).append(name)
    means = [names for names in kinds.values() if len(names) > 1]
    out = Table(title=title)
    out.add_column("model")
    out.add_column("α", justify="right")
    for name, row in sets.items():
        head = f"{name}\n{metric_name(row.metric)}, {row.shift}\nn {row.n}"
        out.add_column(head, justify="right", overflow="fold")
    has_kept = any(KEPT in row.metrics for row in rows)
    for names in means:
        first = sets[names[0]]
        out.add_column(f"mean of\n{len(names)} {first.shift}\n{first.dense or ''}", justify="right")
    if pairs:
        out.add_column("H\nbase,\nnovel", justify="right")
    if has_kept:
        out.add_column("kept of\nthe base", justify="right")
    models: dict[tuple[str, float | None], dict[str, Row]] = {}
    for row in rows:
        models.setdefault((row.source, row.alpha), {})[row.dataset] = row
    for (source, alpha), of_set in models.items():
        values = {name: own_metric(row) for name, row in of_set.items()}
        cells = [_figure(of_set[name]) if name in of_set else "" for name in sets]
        cells += [_two_places(_mean_of(values, names)) for names in means]
        if pairs:
            halves = [_mean_of(values, names) for names in zip(*pairs, strict=True)]
            known = [half for half in halves if half is not None]
            cells.append(_two_places(harmonic(*known) if len(known) == len(halves) else None))
        if has_kept:
            cells.append(_two_places(mean_kept(of_set.values())))
        out.add_row(source, "" if alpha is None else f"{alpha:g}", *cells)
    return out


def _mean_of(values: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The mean of a model's figures on these sets; None where it was not evaluated on all."""
    found = [values[name] for name in names if name in values]
    return sum(found) / len(found) if len(found) == len(names) else None


def _two_places(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _kind(row: Row) -> tuple[object, ...]:
    """Data sets of one kind may be averaged; dense segmentation, true masks and a network's are
    different kinds.
    """
    return row.shift, row.metric, row.dense, row.proposals is None, row.background is None


def _figure(row: Row) -> str:
    lines = [f"{own_metric(row):.2f}"]
    interval = (row.intervals or {}).get(row.metric)
    if interval is not None:
        lines.append(f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}")
    if "ece" in row.metrics:
        lines.append(f"ECE {100 * row.metrics['ece']:.1f}")
    return "\n".join(lines)


def prompts(rows: Sequence[Row]) -> list[str]:
    """A line for each list of prompt templates, with the data sets that it was used for."""
    sets: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        if row.templates:
            sets.setdefault(row.templates, {})[row.dataset] = None
    return [
        f"prompts of {', '.join(names)}: {templates[0]!r}"
        + (f" to {templates[-1]!r}, {len(templates)} templates" if len(templates) > 1 else "")
        for templates, names in sets.items()
    ]


def warnings(rows: Sequence[Row]) -> list[str]:
    """A line for each list of labels that a model can't tell apart, with the data sets and the
    models.
    """
    found: dict[tuple[tuple[str, str], ...], tuple[dict[str, None], dict[str, None]]] = {}
    for row in rows:
        if row.indistinguishable:
            sets, models = found.setdefault(tuple(row.indistinguishable), ({}, {}))
            sets[row.dataset] = None
            models[model_name(row.source, row.alpha)] = None
    return [
        f"{', '.join(sets)}: warning: {', '.join(models)} can't tell apart "
        + ", ".join(f"{one!r} and {other!r}" for one, other in alike[:5])
        + (f" and {len(alike) - 5} pairs more" if len(alike) > 5 else "")
        + f" (cosine of the texts above {SAME}): their scores are ties, and the first label wins"
        for alike, (sets, models) in found.items()
    ]


def _read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(Row.from_json(line))
        except ValueError as error:
            raise RAdapterError(
                f"{path}, line {number} is no row of results: {error}; move the file away"
            ) from error
    return rows
