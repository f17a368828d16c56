"""Rows of results: the file that they stand in, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged

Row = dict[str, Any]
FILE = "results.jsonl"
MEASURED = ("metrics", "runtime")


class Results:
    """`results.jsonl` in a folder: one row a line; after each `add` the file is whole.

    Args:
        folder: made with the first row.
        resume: keep the rows that are there.

    Raises:
        RAdapterError: there are rows and `resume` is not set, or the file is not one of rows.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False) -> None:
        self.path = Path(folder) / FILE
        self.rows: list[Row] = []
        if self.path.exists():
            if not resume:
                raise RAdapterError(f"{self.path} holds results; add to them by --resume, or name another --out")
            self.rows = _read(self.path)

    def find(self, facts: Mapping[str, Any]) -> Row | None:
        """The row of these facts, which are all of a row but what was measured."""
        key = _key(facts)
        return next((row for row in self.rows if _key(row) == key), None)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, and write the file."""
        self.rows += rows
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in self.rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with staged(self.path) as part:
                part.write_text(lines, encoding="utf-8")
        except OSError as error:
            raise RAdapterError(f"could not write {self.path}: {error.strerror}") from error


def curve(rows: Sequence[Row]) -> list[dict[str, float]]:
    """For each α, ascending, the set's own metric in per cent by the name of the set, and `alpha`.

    Args:
        rows: of one source, each with an α.
    """
    points: dict[float, dict[str, float]] = {}
    for row in rows:
        point = points.setdefault(row["alpha"], {"alpha": row["alpha"]})
        point[row["dataset"]] = 100 * row["metrics"][row["metric"]]
    return [points[alpha] for alpha in sorted(points)]


def metric_name(metric: str) -> str:
    """A metric as papers name it: `mIoU`, `image R@1` (images found by a text), ..."""
    names = {"miou": "mIoU", "pixel_accuracy": "pixel acc", "mean_class_accuracy": "mean acc", "harmonic_mean": "H"}
    return names.get(metric, metric.replace("_retrieval_recall", " R"))


def harmonic_means(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """A row for each model and each data set of which it was judged by base and by novel classes.

    Args:
        rows: of any models and data sets.
        pairs: names of the sets of base and of novel classes.
    """
    found = {(row["source"], row["alpha"], row["dataset"]): row for row in rows}
    means = []
    for base, novel in pairs:
        for (source, alpha, name), row in found.items():
            other = found.get((source, alpha, novel))
            if name != base or other is None:
                continue
            values = {"base": row["metrics"][row["metric"]], "novel": other["metrics"][other["metric"]]}
            facts = {key: value for key, value in row.items() if key not in (*MEASURED, "class_split", "classes")}
            facts |= {"dataset": f"{base} and {novel}", "metric": "harmonic_mean", "n": row["n"] + other["n"]}
            facts["set_digest"] = f"{row['set_digest']} {other['set_digest']}"
            runtime = round(row["runtime"] + other["runtime"], 3)
            means.append(
                {**facts, "metrics": {**values, "harmonic_mean": harmonic(*values.values())}, "runtime": runtime}
            )
    return means


def harmonic(*values: float) -> float:
    """The harmonic mean; 0 where a value is."""
    return len(values) / sum(1 / value for value in values) if all(values) else 0.0


def table(rows: Sequence[Row], title: str, pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Models down, data sets across, with the means over sets in and out of distribution; per cent.

    Args:
        rows: of any sources and data sets.
        title: above the table.
        pairs: names of the sets of base and of novel classes; H is the harmonic mean of their two means.
    """
    sets = {row["dataset"]: row for row in rows}
    shifts = {s: [name for name, row in sets.items() if row["shift"] == s] for s in ("id", "ood")}
    means = [s for s in ("id", "ood") if len(shifts[s]) > 1]
    out = Table(title=title)
    for column in ("model", "α"):
        out.add_column(column, justify="left" if column == "model" else "right")
    for s in ("id", "ood"):
        for name in shifts[s]:
            out.add_column(f"{name}\n{metric_name(sets[name]['metric'])}\n{s}", justify="right")
    for s in means:
        out.add_column(f"mean of\n{len(shifts[s])}\n{s}", justify="right")
    if pairs:
        out.add_column("H\nbase,\nnovel", justify="right")
    models: dict[tuple[str, Any], dict[str, float]] = {}
    for row in rows:
        models.setdefault((row["source"], row["alpha"]), {})[row["dataset"]] = 100 * row["metrics"][row["metric"]]
    for (source, alpha), values in models.items():
        cells = [f"{values[name]:.2f}" if name in values else "" for s in shifts for name in shifts[s]]
        for s in means:
            found = [values[name] for name in shifts[s] if name in values]
            cells.append(f"{sum(found) / len(found):.2f}" if len(found) == len(shifts[s]) else "")
        if pairs:
            means_of = [[values.get(name) for name in names] for names in zip(*pairs, strict=True)]
            whole = all(value is not None for of in means_of for value in of)
            cells.append(f"{harmonic(*(sum(of) / len(of) for of in means_of)):.2f}" if whole else "")  # type: ignore[arg-type]
        out.add_row(source, "" if alpha is None else f"{alpha:g}", *cells)
    return out


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in MEASURED}, sort_keys=True)


def _read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if not {"dataset", "metrics", "metric", "source"} <= set(row):
                raise ValueError("fields are missing")
        except (ValueError, TypeError) as error:
            raise RAdapterError(f"{path}, line {number} is no row of results: {error}; move the file away") from error
        rows.append(row)
    return rows
