"""Rows of results: the file that they stand in, and tables of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from radapter_serve.errors import RAdapterError

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
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in self.rows), encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            raise RAdapterError(f"could not write {self.path}: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)


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


def table(rows: Sequence[Row], title: str) -> Table:
    """Models down, data sets across, with the means over sets in and out of distribution; per cent.

    Args:
        rows: of any sources and data sets.
        title: above the table.
    """
    sets = {row["dataset"]: row for row in rows}
    shifts = {s: [name for name, row in sets.items() if row["shift"] == s] for s in ("id", "ood")}
    means = [s for s in ("id", "ood") if len(shifts[s]) > 1]
    out = Table(title=title)
    for column in ("model", "α"):
        out.add_column(column, justify="left" if column == "model" else "right")
    for s in ("id", "ood"):
        for name in shifts[s]:
            out.add_column(f"{name}\n{sets[name]['metric'].replace('_retrieval_recall', ' R')}\n{s}", justify="right")
    for s in means:
        out.add_column(f"mean of\n{len(shifts[s])}\n{s}", justify="right")
    models: dict[tuple[str, Any], dict[str, float]] = {}
    for row in rows:
        models.setdefault((row["source"], row["alpha"]), {})[row["dataset"]] = 100 * row["metrics"][row["metric"]]
    for (source, alpha), values in models.items():
        cells = [f"{values[name]:.2f}" if name in values else "" for s in shifts for name in shifts[s]]
        for s in means:
            found = [values[name] for name in shifts[s] if name in values]
            cells.append(f"{sum(found) / len(found):.2f}" if len(found) == len(shifts[s]) else "")
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
