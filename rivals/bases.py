"""`python -m rivals.bases`: what methods gain and lose on several bases, from the cells that
`rivals.default`, `rivals.others` and `rivals.table` kept of each.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from radapter_serve.cli import run as run_command
from rivals.cells import Cell, read_cells
from rivals.default import Outcome
from rivals.layout import markdown, origin, publish
from rivals.others import SMALL, Judged
from rivals.projection import LABELS, over_bases, table
from rivals.statistics import Images
from rivals.table import leads
from rivals.tables import images_of

MAIN = "table-main.jsonl"
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


def images_by_row(folder: Path) -> dict[str, dict[str, Images]]:
    """Read the test cells of `rivals.table main` of a base: each image's part of every column, with
    the mean of the seeds, by row.
    """
    seeds: dict[str, list[dict[str, Images]]] = defaultdict(list)
    for cell in read_cells(folder / MAIN, Cell.of):
        if cell.split == "test":
            seeds[cell.name].append(images_of(cell.rows))
    return {
        name: {
            head: [
                np.mean(sets, axis=0) for sets in zip(*(seed[head] for seed in of_row), strict=True)
            ]
            for head in of_row[0]
        }
        for name, of_row in seeds.items()
    }


def bases(folder: tuple[Path, ...], out: Path) -> None:
    """Compare what methods gain and lose on several bases; print and write Markdown.

    Args:
        folder: a folder for each base, with default/default.jsonl and others/others.jsonl; if all
            have table-main.jsonl too, the page has the rows of `rivals.table main`.
        out: folder of bases.md.
    """
    of_bases = [rows_of(place) for place in folder]
    parts = [
        "# Several bases",
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

    # All classes: accuracies and leads of the rows that all bases have.
    if all((place / MAIN).exists() for place in folder):
        of_main = [images_by_row(place) for place in folder]
        shared = [name for name in of_main[0] if all(name in by_name for by_name in of_main)]
        heads = list(of_main[0][shared[0]])
        lines = []
        for name in shared:
            by_head = [
                [100 * float(np.mean([*map(np.mean, by_name[name][head])])) for by_name in of_main]
                for head in heads
            ]
            lines.append(
                [name, *(" ".join(f"{each:.1f}" for each in column) for column in by_head)]
            )
        images = {name: [by_name[name] for by_name in of_main] for name in shared}
        parts += [
            "## Trained: all classes",
            "The rows of `rivals.table main` that all bases have: accuracies in %, of each base the"
            " mean of its seeds; and leads.",
            markdown(["method", *heads], lines) + leads(heads, images, "bases"),
        ]
    publish(parts, out / "bases.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(bases, argv, prog="python -m rivals.bases")


if __name__ == "__main__":
    sys.exit(main())
