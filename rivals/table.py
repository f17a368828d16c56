"""`python -m rivals.table`: a table of the paper on any benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import tyro

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from rivals.flags import Flags, TableName, check_seeds


def table(
    number: TableName,
    /,
    flags: tyro.conf.OmitArgPrefixes[Flags],
    seeds: tuple[int, ...] = (0,),
    validation_seeds: tuple[int, ...] | None = None,
    only: tuple[str, ...] = (),
    alpha: Literal["paper", "validation"] = "paper",
    rates: tuple[float, ...] = (1.0,),
    soup: int = 72,
) -> None:
    """Make a table of the paper: learn and judge what is missing, print it, write Markdown and a
    picture.

    Args:
        number: which table; all has every system.
        flags: of all methods.
        seeds: each method learns once for each.
        validation_seeds: those of --seeds by whose mean validation chooses; by default all.
        only: rows to make, by their names in the table; by default all.
        alpha: paper takes each method's own; validation chooses it for each method on the
            validation sets, from 0.25, 0.5, 0.75 and 1.
        rates: factors of each method's own learning rate, of which the validation sets choose one
            for each method; the grid grows until the best is inside. A single factor is applied
            without a choice.
        soup: models of the uniform soup.
    """
    check_seeds(seeds)
    if validation_seeds is not None:
        check_seeds(validation_seeds, flag="--validation-seeds")
        if other := sorted(set(validation_seeds) - set(seeds)):
            raise RAdapterError(
                f"--validation-seeds has {other[0]}, which --seeds has not; allowed: any of"
                f" {' '.join(map(str, seeds))}"
            )
    benchmark = flags.benchmark()
    from rivals.make import Choices, make_table  # torch takes seconds to load

    choices = Choices(
        seeds, validation_seeds, only, alpha == "validation", rates, soup, flags.limit
    )
    make_table(number, benchmark, flags.out, choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(table, argv, prog="python -m rivals.table")


if __name__ == "__main__":
    sys.exit(main())
