"""Write the part of the benchmark that the wheel carries for `radapter-demo`.

    python -m benchmarks.drawings.ship --package package --pairs pairs --benchmark DATA/drawings

The same benchmark makes the same files, byte for byte. Sets that ask for the same licence stay out.
"""

from __future__ import annotations

import csv
import json
import lzma
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import tyro

from benchmarks.drawings.iconify import SHARE_ALIKE, VERSION, attribution, drawings, sources
from radapter_serve.demo.data import CLASSES, DRAWINGS, TEMPLATES

CREDITS = DRAWINGS.parent / "ATTRIBUTION.md"
HEAD = """# Where the demo's drawings and weights come from

Each set keeps the licence of its source; nothing here is covered by the project's own.

`drawings/drawings.json.xz` holds drawings of @iconify/json {version} as SVG, unchanged, by their places in the
benchmark of drawings. `benchmarks/drawings/` of the project chooses and places them.

`base/` was trained from scratch by `benchmarks/train_drawings_base.py` of the project's history, on the drawings of the second
table and from no other weights. It is offered under CC BY 4.0; whom to credit is in that table.

"""


def ship(
    package: Path, pairs: Path, benchmark: Path, folder: Path, credits_file: Path
) -> dict[str, str]:
    """Write drawings, classes and templates into a folder, and whom to credit into a file of Markdown;
    returns the SVG documents by their places, such as `train/airplane/icon-park--airplane.svg`.
    """
    places: dict[str, dict[str, str]] = defaultdict(dict)
    with (benchmark / "index.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["licence"] not in SHARE_ALIKE:
                places[row["set"]][row["name"]] = row["path"].removesuffix(".png") + ".svg"
    meanings = {
        names[drawing.name]: drawing.svg
        for source, names in places.items()
        for drawing in drawings(package, source)
        if drawing.name in names
    }
    text = json.dumps(dict(sorted(meanings.items())), ensure_ascii=False)
    (folder / "drawings.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))
    for name in (CLASSES, TEMPLATES):
        shutil.copyfile(benchmark / name.name, folder / name.name)
    used = Counter({source: len(names) for source, names in places.items()})
    shown = attribution("The drawings", used, sources(package))
    learned = (pairs / "ATTRIBUTION.md").read_text(encoding="utf-8").partition("\n")[2]
    tables = f"#{shown}\n## What the base was trained on\n{learned}"
    credits_file.write_text(HEAD.format(version=VERSION) + tables, encoding="utf-8")
    return meanings


def main(package: Path, pairs: Path, benchmark: Path) -> None:
    """Write the part that the wheel carries.

    Args:
        package: the unpacked npm package @iconify/json.
        pairs: folder of benchmarks.drawings.pairs.
        benchmark: folder of benchmarks.drawings.build.
    """
    print(f"{len(ship(package, pairs, benchmark, DRAWINGS, CREDITS))} drawings in {DRAWINGS}")


if __name__ == "__main__":
    tyro.cli(main)
