"""`python -m rivals.rate`: what `learning_rate: auto` chooses, against whole runs at every rate."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from radapter_serve.cli import run as run_command
from radapter_serve.errors import RAdapterError
from rivals.flags import Flags, check_seeds


def rate(flags: tyro.conf.OmitArgPrefixes[Flags], seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Let R-Adapter with `preserve` find its rate for each seed, learn at each rate as a whole,
    and judge all on the test sets; print it, write Markdown.

    Args:
        flags: as of rivals.table; its finished runs count.
        seeds: the search and each whole run are made once for each.
    """
    check_seeds(seeds)
    benchmark, out = flags.benchmark(), flags.out
    entries = [one for one in benchmark.suite.of_split("validation") if one.shift == "id"]
    if len(entries) != 1:
        raise RAdapterError(
            f"the suite {benchmark.name} has {len(entries)} sets with split: validation and shift:"
            " id; the search needs one"
        )
    from radapter_serve.training.rate import START  # torch takes seconds to load
    from rivals.cells import Cells
    from rivals.layout import markdown
    from rivals.make import command_line, machine, say
    from rivals.tables import TABLES

    method = TABLES["main"].rows["R-Adapter, preserve"]
    cells = Cells(benchmark, out, "rate", flags.limit, say)
    reader, colon, place = entries[0].data.partition(":")
    val_data = f"{reader}:{benchmark.suite.data_root / place}" if colon else entries[0].data
    found = {seed: _found(benchmark.given, method.settings, seed, val_data) for seed in seeds}
    rates = sorted({*START, 5e-3, *(chosen for chosen, _ in found.values())})
    lines = []
    for seed in seeds:
        chosen, seconds = found[seed]
        judged = {}
        for one in rates:
            own = dataclasses.replace(method, settings={**method.settings, "learning_rate": one})
            cell = cells.cell("R-Adapter, preserve", own, seed, [0.5])
            judged[one] = _means(cell.rows), cell.cost.seconds
        whole = judged[chosen][1]
        best = max(rates, key=lambda one: sum(judged[one][0]))
        lines.append(
            [
                str(seed),
                f"{chosen:.2g}",
                *(f"{value:.1f}" for value in judged[chosen][0]),
                f"{best:.2g}",
                *(f"{value:.1f}" for value in judged[best][0]),
                f"{(sum(judged[best][0]) - sum(judged[chosen][0])) / 2:.1f}",
                f"{seconds / whole:.2f}",
            ]
        )
    head = ["seed", "chosen", "id", "shifts", "best of the grid", "id", "shifts"]
    head += ["behind, points", "search, in whole runs"]
    parts = [
        "# What learning_rate: auto chooses",
        f"`{command_line('rivals.rate')}`, {datetime.date.today()}, {machine()}.\n"
        f"Benchmark {benchmark.name}, R-Adapter with preserve at α = 0.5, in %. The search saw the"
        " validation images in distribution alone; the grid was judged on the test sets, at"
        f" {', '.join(f'{one:.2g}' for one in rates)}. Behind is the mean of both columns.",
        markdown(head, lines),
    ]
    text = "\n\n".join(parts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "rate.md").write_text(text, encoding="utf-8")
    say(f"wrote {out / 'rate.md'}")
    print(text)


def _found(
    given: Mapping[str, Any], settings: Mapping[str, Any], seed: int, val_data: str
) -> tuple[float, float]:
    """The rate that the search chooses, and the seconds that it takes."""
    from radapter_serve.training.parts import OWN
    from radapter_serve.training.rate import search_rate
    from radapter_serve.training.recipe import Recipe
    from radapter_serve.training.tasks import open_run
    from rivals.make import say

    recipe = Recipe(
        **{**settings, **given, "seed": seed, "learning_rate": "auto", "val_data": val_data}
    )
    recipe.check()
    opened = open_run(recipe, progress=False)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        chosen, _ = search_rate(recipe, opened, Path(folder), OWN, say)
    return chosen.peak_rate, time.perf_counter() - began


def _means(rows: Sequence[object]) -> tuple[float, float]:
    """Accuracy in distribution, and the mean of the shifts, in %."""
    from radapter_serve.evaluation.results import by_shift, own_metric
    from rivals.cells import Judged

    of = {row.dataset: row for row in rows if isinstance(row, Judged)}
    ids, shifted = by_shift(of)
    return mean(own_metric(of[name]) for name in ids), mean(own_metric(of[one]) for one in shifted)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(rate, argv, prog="python -m rivals.rate")


if __name__ == "__main__":
    sys.exit(main())
