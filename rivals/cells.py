"""Cells of a table: one method and one seed, learned and judged once, and kept."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.evaluation.evaluation_set import EvaluationSet
from radapter_serve.evaluation.overlap import Overlap
from radapter_serve.evaluation.results import Row, by_shift, own_metric
from radapter_serve.files import staged
from radapter_serve.threads import limit_threads
from rivals.benchmark import Benchmark
from rivals.judge import judge
from rivals.method import Method, at_rate, kept, learned
from rivals.run import Run, moved
from rivals.system import Cost

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))
OF_A_ROW = ("dataset", "task", "shift", "split", "alpha", "n", "metric", "metrics", "set_digest")


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
    rows: list[Row]


@dataclass
class Cells:
    """All cells of one benchmark; those that are done are read from the folder.

    Attributes:
        benchmark: from `load_benchmark`.
        folder: of cells, and of what was learned.
        limit: images of a set at most.
        say: told what is done next.
    """

    benchmark: Benchmark
    folder: Path
    limit: int | None = None
    say: Callable[[str], None] = print
    _runs: dict[int, Run] = field(default_factory=dict)
    _sets: dict[str, list[EvaluationSet]] = field(default_factory=dict)

    def cell(self, name: str, method: Method, seed: int, alphas: Sequence[float], split: str = "test") -> Cell:
        """Learn and judge, or read what was found before.

        Args:
            name: of the method, for messages and files.
            method: learns by its own settings, where the benchmark has none.
            seed: of the draws of training.
            alphas: points on the line from the start to the end to judge at.
            split: which sets judge.
        """
        run = self._run(seed)
        sets = self._open(split)
        entries = [{key: moved(value) for key, value in vars(data.entry).items()} for data in sets]
        facts = [[row.facts["set_digest"] for row in sets], entries, list(alphas)]
        digest = run.of(method.settings).digest(dataclasses.replace(method, alpha=None), *facts)
        stem = re.sub(r"\W+", "-", name.lower())
        path = self.folder / "cells" / f"{stem}-{seed}-{split}-{digest}.json"
        if path.exists():
            return _read(path, method)
        if not kept(method, run).exists():
            self.say(f"{name}, seed {seed}: learning")
            _apart(method, run)
        self.say(f"{name}, seed {seed}: judging")
        found = learned(method, run)
        rows = [{key: row[key] for key in OF_A_ROW} for row in judge(found, run.of(method.settings), sets, alphas)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as part:
            values = {"method": repr(method), "cost": dataclasses.asdict(found.cost), "rows": rows}
            part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return Cell(method, found.cost, rows)

    def chosen_alpha(self, name: str, method: Method, seed: int) -> Method:
        """The method at the α that validation sets like best; of equal ones the smallest."""
        if method.alpha is None:
            return method
        rows = self.cell(name, method, seed, ALPHAS, "validation").rows
        scores = {alpha: score([row for row in rows if row["alpha"] == alpha]) for alpha in ALPHAS}
        return dataclasses.replace(method, alpha=max(ALPHAS, key=lambda alpha: (scores[alpha], -alpha)))

    def chosen_rate(self, name: str, method: Method, seed: int, factors: Sequence[float]) -> Method:
        """The method with its learning rate times the factor that validation sets like best; of equals the first.

        Args:
            name, method, seed: as of `cell`.
            factors: to choose from; one alone is taken as it is.
        """
        rate = method.settings.get("learning_rate")
        if rate is None or set(factors) <= {1}:
            return method
        if "learning_rate" in self.benchmark.given:
            raise RAdapterError("the benchmark sets learning_rate for every method; take it out, or leave out --rates")
        methods = [at_rate(method, factor) for factor in factors]
        if len(methods) == 1:
            return methods[0]
        alphas = [1.0 if method.alpha is None else method.alpha]
        scores = [score(self.cell(name, one, seed, alphas, "validation").rows) for one in methods]
        return methods[scores.index(max(scores))]

    def warnings(self) -> list[str]:
        """A line for each test set that has images in common with the sets that chose."""
        overlap = Overlap()
        for data in self._sets.get("validation", []):
            overlap.chosen_by(data)
        for data in self._sets.get("test", []):
            overlap.tested(data)
        return overlap.warnings

    def _run(self, seed: int) -> Run:
        if seed not in self._runs:
            self._runs[seed] = Run({**self.benchmark.given, "seed": seed}, self.folder / "learned")
        return self._runs[seed]

    def _open(self, split: str) -> list[EvaluationSet]:
        if split not in self._sets:
            self._sets[split] = self.benchmark.sets(split, self.limit)
        return self._sets[split]


def _read(path: Path, method: Method) -> Cell:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Cell(method, Cost(**found["cost"]), [{key: row[key] for key in OF_A_ROW} for row in found["rows"]])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RAdapterError(f"the cell {path} can't be read ({reason(error)}); remove it, to make it again") from None


def score(rows: Sequence[Row]) -> float:
    """What a choice goes by: the mean of two means, over the sets in distribution and over the shifted ones, rounded.

    Args:
        rows: one of each validation set.
    """
    values = {row["dataset"]: own_metric(row) for row in rows}
    groups = [names for names in by_shift({row["dataset"]: row for row in rows}) if names]
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
