"""`python -m rivals.bases`: R-Adapter on half of the classes of several bases, from the cells that
`rivals.default` and `rivals.others` kept of each.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from radapter_serve.cli import run as run_command
from rivals.cells import read_cells
from rivals.default import Outcome
from rivals.layout import origin, publish
from rivals.others import SMALL, Judged
from rivals.projection import LABELS, over_bases, table

KINDS = LABELS.keys() - {"searches"}  # an interval needs more texts than a few classes have


def rows_of(folder: Path) -> dict[str, list[Judged]]:
    """Read the rows of a base, by split; each is named by its method and α."""
    rows = []
    path = folder / "default" / "default.jsonl"
    for run in read_cells(
        path, lambda cell: Outcome(**{**cell, "rows": [Judged(*row) for row in cell["rows"]]})
    ):
        rows += [row for row in run.rows if run.candidate == "base"]
        for choice in run.alphas:
            name = f"{run.candidate}, α {choice}"
            rows += [replace(row, method=name) for row in run.at(choice)]
    path = folder / "others" / "others.jsonl"
    for cell in read_cells(path, lambda cell: [Judged(*cell["run"], *row) for row in cell["rows"]]):
        rows += [
            replace(row, method=f"{row.method}, α {row.alpha:g}")
            for row in cell
            if row.method != "base"
        ]
    by_split: dict[str, list[Judged]] = defaultdict(list)
    for row in rows:
        if row.kind in KINDS:
            by_split[row.split].append(row)
    return by_split


def bases(folder: tuple[Path, ...], out: Path) -> None:
    """Compare what R-Adapter gains and loses on several bases; print and write Markdown.

    Args:
        folder: a folder for each base, with default/default.jsonl and others/others.jsonl.
        out: folder of bases.md.
    """
    of_bases = [rows_of(place) for place in folder]
    parts = [
        "# Half of the classes, several bases",
        f"{origin('rivals.bases')}\nR-Adapter on {len(folder)} bases: the recipe `small` with the α"
        " of `auto` and others, the fields of `small` (preserve, words) and those of the paper"
        " (R-Adapter) as in `rivals.others`. A base has accuracies in %, the others what they lead"
        " it by, in points. In the tables of all bases, the seeds of a base are averaged, and ± is"
        " half of a 95 % interval over images and bases; in those of one base, over images and"
        " seeds, if it has several. **Bold** survives Holm's correction over a table.",
    ]
    small, paper = (f"{name}, α {SMALL[1]}" for name in (SMALL[0], "R-Adapter"))
    for split in of_bases[0]:
        # Show the rows that all bases have.
        studies = [by_split[split] for by_split in of_bases]
        names = dict.fromkeys(row.method for row in studies[0])
        for rows in studies:
            names = {name: None for name in names if name in {row.method for row in rows}}
        del names["base"]
        before = [[row for row in rows if row.method == "base"] for rows in studies]
        shown = [[row for row in rows if row.method in names] for rows in studies]
        home = before[0][0].style
        parts += [
            f"## Trained: the {split} of the classes",
            over_bases(
                list(zip(shown, before, strict=True)),
                home,
                (paper, small) if {paper, small} <= names.keys() else None,
            ),
        ]
        for number, (rows, base) in enumerate(zip(shown, before, strict=True)):
            groups = {name: [row for row in rows if row.method == name] for name in names}
            seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
            parts += [f"**Base {number}**, seeds {seeds}", table(groups, base, home, {})]
    publish(parts, out / "bases.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(bases, argv, prog="python -m rivals.bases")


if __name__ == "__main__":
    sys.exit(main())
