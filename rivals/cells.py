"""Cells of a table: one method and one seed, learned and judged once, and kept."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.rows import Row, by_shift, own_metric, unpacked
from radapter_serve.evaluation.run import warn_of_overlap
from radapter_serve.evaluation.suite import Entry
from radapter_serve.threads import limit_threads
from rivals.benchmark import Benchmark
from rivals.judge import judge
from rivals.method import Method, kept, learned
from rivals.run import Run, moved
from rivals.system import Cost

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True)
class Judged:
    """What a cell keeps of a row of results."""

    dataset: str
    task: str
    shift: str
    split: str
    alpha: float | None
    n: int
    metric: str
    metrics: dict[str, float]
    set_digest: str
    captions: int | None = None
    right: str | list[int] | None = None

    @classmethod
    def of(cls, row: Row) -> Judged:
        """The part of a row that is kept."""
        return cls(**{field.name: getattr(row, field.name) for field in dataclasses.fields(cls)})

    @property
    def per_image(self) -> NDArray[np.float64] | None:
        """What each image adds to the metric, [n]; None where nobody kept it."""
        return None if self.right is None else unpacked(self.right, self.n, self.captions)


@dataclass(frozen=True)
class Cell:
    """What one method and one seed gave.

    Attributes:
        method: with what validation has chosen for it.
        cost: of learning.
        rows: of results, of every set at every α that was asked for.
    """

    method: Method
    cost: Cost
    rows: list[Judged]


@dataclass
class Cells:
    """All cells of one benchmark; those that are done are read from the folder.

    Attributes:
        benchmark: from `load_benchmark`.
        folder: of the cells of all tables, and of what was learned.
        table: whose cells these are; new ones go to `TABLE.jsonl`, one a line.
        limit: images of a set at most.
        say: told what is done next.
    """

    benchmark: Benchmark
    folder: Path
    table: str = "cells"
    limit: int | None = None
    say: Callable[[str], None] = print
    _runs: dict[int, Run] = field(default_factory=dict)
    _sets: dict[str, list[EvaluationSet]] = field(default_factory=dict)

    def cell(
        self, name: str, method: Method, seed: int, alphas: Sequence[float], split: str = "test"
    ) -> Cell:
        """Learn and judge, or read what was found before, for whichever table.

        Args:
            name: of the method, for messages and files.
            method: learns by its own settings, where the benchmark has none.
            seed: of the draws of training.
            alphas: points on the line from the start to the end to judge at.
            split: which sets judge.
        """
        run = self._run(seed)
        digest = self._digest(run, method, alphas, split)
        found = self._kept.get(digest)
        if found is not None:
            return found.cell(method)
        if not kept(method, run).exists():
            self.say(f"{name}, seed {seed}: learning")
            _apart(method, run)
        self.say(f"{name}, seed {seed}: judging")
        system = learned(method, run)
        judged = judge(system, run.of(method.settings), self._open(split), alphas)
        cell = Cell(method, system.cost, [Judged.of(row) for row in judged])
        self._keep(Line(digest, name, seed, split, repr(method), vars(cell.cost), cell.rows))
        return cell

    def warnings(self) -> list[str]:
        """A line for each test set that has images in common with the sets that chose."""
        return warn_of_overlap(self._sets.get("validation", []), self._sets.get("test", []))

    def _digest(self, run: Run, method: Method, alphas: Sequence[float], split: str) -> str:
        sets = self._open(split)
        entries = [_spelled(data.entry) for data in sets]
        facts = [[data.set_digest for data in sets], entries, list(alphas)]
        return run.of(method.settings).digest(dataclasses.replace(method, alpha=None), *facts)

    @cached_property
    def _kept(self) -> dict[str, Line]:
        lines = (line for path in sorted(self.folder.glob("*.jsonl")) for line in read_lines(path))
        return {line.digest: line for line in lines}

    def _keep(self, line: Line) -> None:
        self._kept[line.digest] = line
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.table}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line.text() + "\n")

    def _run(self, seed: int) -> Run:
        if seed not in self._runs:
            self._runs[seed] = Run({**self.benchmark.given, "seed": seed}, self.folder / "learned")
        return self._runs[seed]

    def _open(self, split: str) -> list[EvaluationSet]:
        if split not in self._sets:
            self._sets[split] = self.benchmark.sets(split, self.limit)
        return self._sets[split]


@dataclass(frozen=True)
class Line:
    """A cell as a file keeps it.

    Attributes:
        digest: of all that it depends on.
        name: of the method in its table.
        seed: of the draws of training.
        split: which sets judged.
        method: in words.
        cost: the fields of `Cost`.
        rows: of results.
    """

    digest: str
    name: str
    seed: int
    split: str
    method: str
    cost: Mapping[str, Any]
    rows: list[Judged]

    def text(self) -> str:
        """One line of JSON."""
        values = {**vars(self), "rows": [vars(row) for row in self.rows]}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

    def cell(self, method: Method) -> Cell:
        """The cell, of a method with what validation has chosen for it."""
        return Cell(method, Cost(**self.cost), self.rows)


def read_lines(path: Path) -> Iterator[Line]:
    """The cells that a file keeps.

    Raises:
        RAdapterError: a line is damaged; names it.
    """
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(text)
            line = Line(**{**values, "rows": [Judged(**row) for row in values["rows"]]})
            Cost(**line.cost)
        except (ValueError, TypeError, KeyError) as error:
            raise RAdapterError(
                f"line {number} of {path} is no cell ({reason(error)}); remove it, to make the cell"
                " again"
            ) from None
        yield line


def _spelled(entry: Entry) -> dict[str, Any]:
    """What an entry of a suite says; what it leaves out is left out, so that a new field changes no
    digest.
    """
    return {
        one.name: moved(getattr(entry, one.name))
        for one in dataclasses.fields(entry)
        if getattr(entry, one.name) != one.default
    }


def score(rows: Sequence[Judged]) -> float:
    """What a choice goes by: the mean of two means, over the sets in distribution and over the
    shifted ones, rounded.

    Args:
        rows: one of each validation set.
    """
    values = {row.dataset: own_metric(row) for row in rows}
    groups = [names for names in by_shift({row.dataset: row for row in rows}) if names]
    return round(mean(mean(values[name] for name in names) for names in groups), 6)


def _apart(method: Method, run: Run) -> None:
    """Learn in a fresh process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            pool.submit(_learn, method, run.given, run.folder).result()
        except RAdapterError as error:
            raise RAdapterError(f"{type(method).__name__}: {error}") from error


def _learn(method: Method, given: Mapping[str, Any], folder: Path) -> None:
    limit_threads(given.get("threads"))
    learned(method, Run(given, folder))
