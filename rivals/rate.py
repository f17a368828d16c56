"""`python -m rivals.rate`: what `learning_rate: auto` chooses, against whole runs at every rate."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from radapter_serve.cli import run as run_command
from radapter_serve.evaluation.sets import below
from radapter_serve.training import Recipe
from radapter_serve.training.rate import START, search_rate
from radapter_serve.training.tasks import open_run
from rivals.beyond import groups
from rivals.cells import Cells
from rivals.flags import Flags, check_seeds
from rivals.layout import markdown
from rivals.make import command_line, machine, publish, say
from rivals.method import Method
from rivals.tables import TABLES

NAME = "R-Adapter, preserve"  # a row of the main table
ALPHA = 0.5
HEAD = [
    *("seed", "chosen", "id", "shifts", "best of the grid", "id", "shifts"),
    *("behind, points", "search, in whole runs"),
]


@dataclass(frozen=True)
class Whole:
    """A whole run at a rate.

    Attributes:
        rate: its learning rate.
        ids, shifts: accuracy on the test sets in distribution, and the mean of the shifts, in %.
        seconds: that it learned.
    """

    rate: float
    ids: float
    shifts: float
    seconds: float

    @property
    def score(self) -> float:
        """The mean of both."""
        return (self.ids + self.shifts) / 2

    def cells(self) -> list[str]:
        """In a row of the table."""
        return [f"{self.rate:.2g}", f"{self.ids:.1f}", f"{self.shifts:.1f}"]


def search(recipe: Recipe) -> tuple[float, float]:
    """The rate that a recipe with `learning_rate: auto` finds, and the seconds that it takes."""
    recipe.check()
    opened = open_run(recipe, progress=False)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, _ = search_rate(recipe, opened, Path(folder), say)
    return found.peak_rate, time.perf_counter() - began


def whole_run(cells: Cells, method: Method, seed: int, rate: float) -> Whole:
    """A whole run, learned and judged once."""
    own = dataclasses.replace(method, settings={**method.settings, "learning_rate": rate})
    cell = cells.cell(NAME, own, seed, [ALPHA])
    found = groups(cell.rows)
    return Whole(rate, found["in distribution"], found["mean of the shifts"], cell.cost.seconds)


def compare(
    cells: Cells, method: Method, found: dict[int, tuple[float, float]], rates: Sequence[float]
) -> str:
    """A row a seed, as Markdown.

    Args:
        cells: of the benchmark.
        method: at any rate.
        found: of each seed the rate that was chosen, and the seconds that it took.
        rates: of the whole runs.
    """
    lines = []
    for seed, (chosen, seconds) in found.items():
        of_rates = {rate: whole_run(cells, method, seed, rate) for rate in rates}
        own = of_rates[chosen]
        best = max(of_rates.values(), key=lambda one: one.score)
        behind = f"{best.score - own.score:.1f}"
        cost = f"{seconds / own.seconds:.2f}"
        lines.append([str(seed), *own.cells(), *best.cells(), behind, cost])
    return markdown(HEAD, lines)


def rate(flags: tyro.conf.OmitArgPrefixes[Flags], seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Let R-Adapter with `preserve` find its rate for each seed, learn at each rate as a whole,
    and judge all on the test sets; print it, write Markdown.

    Args:
        flags: as of rivals.table; its finished runs count.
        seeds: the search and each whole run are made once for each.
    """
    check_seeds(seeds)
    benchmark = flags.benchmark()
    out = flags.out
    validation = benchmark.own_validation()
    method = TABLES["main"].rows[NAME]
    auto = {"learning_rate": "auto", "val_data": below(benchmark.suite.data_root, validation.data)}
    given = {**method.settings, **benchmark.given, **auto}
    found = {seed: search(Recipe(**{**given, "seed": seed})) for seed in seeds}
    rates = sorted({*START, 5e-3, *(chosen for chosen, _ in found.values())})
    cells = Cells(benchmark, out, "rate", flags.limit, say)
    shown = compare(cells, method, found, rates)
    parts = [
        "# What learning_rate: auto chooses",
        f"`{command_line('rivals.rate')}`, {datetime.date.today()}, {machine()}.\n"
        f"Benchmark {benchmark.name}, {NAME} at α = {ALPHA:g}, in %. The search saw the"
        " validation images in distribution alone; the grid was judged on the test sets, at"
        f" {', '.join(f'{one:.2g}' for one in rates)}. Behind is the mean of both columns.",
        shown,
    ]
    publish(parts, out / "rate.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(rate, argv, prog="python -m rivals.rate")


if __name__ == "__main__":
    sys.exit(main())
