"""`python -m rivals.table`: a table of the paper on a benchmark of one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from radapter_serve.cli import run
from radapter_serve.threads import limit_threads


def table(
    number: Literal["1", "2", "3", "4", "5", "hyper", "fig3", "all"],
    /,
    data: Path,
    data_root: Path | None = None,
    out: Path = Path("runs/rivals"),
    seeds: tuple[int, ...] = (0,),
    only: tuple[str, ...] = (),
    alpha: Literal["paper", "validation"] = "paper",
    rates: tuple[float, ...] = (1.0,),
    architecture: str | None = None,
    pretrained: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    precision: Literal["no", "bf16"] | None = None,
    soup: int = 72,
    limit: int | None = None,
    threads: int | None = None,
) -> None:
    """Make a table of the paper: learn and judge what is missing, print it, write Markdown and a picture.

    What is done is kept in the folder, and not done again.

    Args:
        number: which table; all has every system.
        data: benchmark file, such as one of rivals/benchmarks; docs/holds-up.md says how to write one.
        data_root: folder that the benchmark's data is in; its own if none is given.
        out: folder of the table and of all that it is made from.
        seeds: each method learns once for each.
        only: rows to make, by the names that the table prints; all if none is given.
        alpha: paper takes each method's own; validation chooses it for each method and seed on the validation sets.
        rates: factors of each method's own learning rate, of which the validation sets choose one for each method, with
            the first seed.
        architecture: base; the benchmark's if none is given.
        pretrained: open_clip tag or checkpoint of the base.
        epochs: passes over the data, for every method.
        steps: optimizer steps, for every method, in place of epochs.
        batch_size: images a step, for every method.
        precision: bf16 computes products in bfloat16 while a method learns, which is faster where the machine has it.
        soup: models of the uniform soup.
        limit: images of a set at most, drawn by a fixed seed.
        threads: threads to compute with; one a core if none is given.
    """
    limit_threads(threads)
    from rivals.benchmark import load_benchmark  # torch takes seconds to load
    from rivals.make import Choices, make_table

    given = {
        "architecture": architecture, "pretrained": pretrained, "epochs": epochs, "steps": steps,
        "batch_size": batch_size, "precision": precision, "threads": threads,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    choices = Choices(seeds, only, alpha == "validation", rates, soup, limit)
    print(make_table(number, load_benchmark(data, data_root), out, given, choices))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(table, argv, prog="python -m rivals.table")


if __name__ == "__main__":
    sys.exit(main())
