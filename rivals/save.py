"""`python -m rivals.save`: what a rival has learned, as a plain open_clip checkpoint, where it can
be one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from radapter_serve.cli import run
from radapter_serve.contract.alpha import check_alpha
from radapter_serve.errors import RAdapterError
from rivals.flags import Flags, TableName


def save(
    name: str,
    to: Path,
    /,
    flags: tyro.conf.OmitArgPrefixes[Flags],
    table: TableName = "all",
    seed: int = 0,
    rate: float = 1.0,
    alpha: float | None = None,
    soup: int = 72,
) -> None:
    """Learn a method, or take what was learned before, and write it as a folder that open_clip
    loads.

    radapter-eval --merged evaluates it, and local-dir:FOLDER is a base for all other commands.

    Args:
        name: of the method, as the table prints it.
        to: folder of the checkpoint.
        flags: of rivals.table, whose systems are taken.
        table: whose row it is: of Table 2 it learns from 16 images a class, of Table 3 from
            captions.
        seed: of the draws of training.
        rate: factor of the method's own learning rate; a table says which it chose.
        alpha: where between start, 0, and end, 1; the method's own if none is given.
        soup: models of the uniform soup.
    """
    check_alpha(0.0 if alpha is None else alpha)
    benchmark = flags.benchmark()
    from radapter_export import write_merged  # torch takes seconds to load
    from rivals.method import at_rate, learned
    from rivals.run import Run
    from rivals.soup import of_members
    from rivals.tables import TABLES

    chosen = TABLES[table]
    if name not in chosen.rows:
        raise RAdapterError(f"table {table} has no row {name!r}; allowed: {', '.join(chosen.rows)}")
    method = of_members(at_rate(chosen.rows[name], rate), soup)
    source = Run({**benchmark.filled(chosen.given).given, "seed": seed}, flags.out / "learned")
    own = 1.0 if method.alpha is None else method.alpha
    weights = learned(method, source).at(own if alpha is None else alpha).clip()
    if weights is None:
        raise RAdapterError(
            f"{name} is no plain CLIP: it has parts that can't be folded, or a head in place of"
            " texts"
        )
    write_merged(to, source.base, weights)
    print(f"wrote {to}; next: radapter-eval --merged {to} --suite SUITE")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(save, argv, prog="python -m rivals.save")


if __name__ == "__main__":
    sys.exit(main())
