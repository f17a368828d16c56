"""Draw the pairs of drawing and name that a base is trained on, once, into one array.

    python -m benchmarks.drawings.pairs --package package --out ~/.cache/drawings

writes `pixels.npy`, premultiplied RGBA, uint8 [N, 48, 48, 4], and `pairs.csv`, a row for each
drawing: set, name, words, number, style, whether it is black (0 or 1), and split: `train`, or
`validation` for sets that are held out. `ATTRIBUTION.md` names every set with its author and
licence.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.progress import track

from benchmarks.drawings.iconify import (
    SHARE_ALIKE,
    VERSION,
    Classes,
    Drawing,
    Roles,
    attribution,
    drawings,
    load_roles,
    render,
    sources,
)
from radapter_serve.files import staged

SIDE = 48
COLUMNS = ["set", "name", "words", "number", "style", "black", "split"]
MOST_STYLES = 3  # drawings of one name and number in a set: in line, filled and two-tone


def chosen(package: Path, roles: Roles) -> Iterator[tuple[Drawing, list[str]]]:
    """The drawings of the pairs, each with its row of the file; no brands, but for words that a
    class is named by.
    """
    kept = Classes().meanings
    brands = {
        drawing.words for name in roles.brands for drawing in drawings(package, name)
    } - kept.keys()
    for name, source in sources(package).items():
        if name in roles.held_out or source.licence in SHARE_ALIKE:
            continue
        seen: dict[tuple[str, str], set[str]] = defaultdict(set)
        for drawing in drawings(package, name):
            styles = seen[drawing.words, drawing.number]
            if (
                drawing.words not in brands
                and drawing.style not in styles
                and len(styles) < MOST_STYLES
            ):
                styles.add(drawing.style)
                said = [name, drawing.name, drawing.words, drawing.number, drawing.style]
                split = "validation" if name in roles.base_validation else "train"
                yield drawing, [*said, "0" if source.colour else "1", split]


def write_pairs(
    package: Path, out: Path, roles: Roles, side: int = SIDE, processes: int = 2
) -> int:
    """Draw all pairs; returns how many there are."""
    plan = list(chosen(package, roles))
    out.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    with (
        staged(out / "pixels.npy") as part,
        multiprocessing.get_context("spawn").Pool(processes) as pool,
    ):
        pixels: Any = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            part, mode="w+", dtype=np.uint8, shape=(len(plan), side, side, 4)
        )
        work = pool.imap(
            partial(render, side=side), (drawing.svg for drawing, _ in plan), chunksize=64
        )
        for (_, row), drawn in track(zip(plan, work, strict=True), "Drawing the pairs", len(plan)):
            if drawn is not None:
                pixels[len(rows)] = drawn
                rows.append(row)
        pixels.flush()
    with staged(out / "pairs.csv") as part, part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    used = Counter(row[0] for row in rows)
    title = f"The pairs of this folder, drawn from @iconify/json {VERSION}"
    (out / "ATTRIBUTION.md").write_text(
        attribution(title, used, sources(package)), encoding="utf-8"
    )
    return len(rows)


def main(package: Path, out: Path, side: int = SIDE, processes: int = 2) -> None:
    """Draw the pairs.

    Args:
        package: the unpacked npm package @iconify/json.
        out: folder of the two files.
        side: width and height of a drawing, in pixels.
        processes: that draw at the same time.
    """
    count = write_pairs(package, out, load_roles(), side, processes)
    print(f"{count} drawings in {out}")


if __name__ == "__main__":
    tyro.cli(main)
