"""`python -m rivals.save`: save a method's model, if it is a plain CLIP, for open_clip."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from radapter_export import write_merged
from radapter_serve.cli import run
from radapter_serve.contract.errors import check_alpha
from radapter_serve.errors import RAdapterError
from rivals.benchmark import Flags, TableName
from rivals.full import of_members
from rivals.method import Run, at_rate, learned
from rivals.tables import TABLES


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
    """Write a method's model as a folder that open_clip loads; train it first if no table did.

    radapter-eval --merged evaluates it, and local-dir:FOLDER is a base for all other commands.

    Args:
        name: of the method in the table.
        to: folder of the checkpoint.
        flags: of rivals.table.
        table: with the row; a row of Table 2 learns from 16 images a class, of Table 3 from
            captions.
        seed: of the random draws in training.
        rate: factor of the method's own learning rate; the table shows the chosen rate.
        alpha: position between start, 0, and end, 1; by default the method's own.
        soup: models of the uniform soup.
    """
    check_alpha(0.0 if alpha is None else alpha)
    benchmark = flags.benchmark()
    chosen = TABLES[table]
    if name not in chosen.rows:
        raise RAdapterError(f"table {table} has no row {name!r}; allowed: {', '.join(chosen.rows)}")
    method = of_members(at_rate(chosen.rows[name], rate), soup)
    source = Run({**benchmark.filled(chosen.fields).fields, "seed": seed}, flags.out / "learned")
    if alpha is None:
        alpha = 1.0 if method.alpha is None else method.alpha
    weights = learned(method, source).at(alpha).clip()
    if weights is None:
        raise RAdapterError(
            f"{name} is not a plain CLIP: it has parts that can't be folded, or a head instead of"
            " texts"
        )
    write_merged(to, source.base, weights)
    print(f"wrote {to}; next: radapter-eval --merged {to} --suite SUITE")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(save, argv, prog="python -m rivals.save")


if __name__ == "__main__":
    sys.exit(main())
