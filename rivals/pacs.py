"""`python -m rivals.pacs`: a benchmark of PACS with training on photos, choice by photos and
sketches, and test on photos, art and cartoons.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from rivals.benchmark import write_benchmark

# A link to PACS keeps paths relative, so that finished runs stay valid if the data moves.
PICTURES = Path("images")
STYLES = ("photo", "art_painting", "cartoon", "sketch")
CHOOSES = "sketch"  # style for the choice: it has the most images, so the smallest errors
# Parts of every five photos of a class
PARTS = ("test", "validation", "train", "train", "train")


def pacs(root: Path, out: Path, /) -> None:
    """Split the photos, and write the benchmark's files.

    Args:
        root: folder with photo/CLASS/*.jpg, art_painting, cartoon and sketch.
        out: folder for benchmark.yaml, its suite and the lists of photos.
    """
    if missing := [style for style in STYLES if not (root / style).is_dir()]:
        raise RAdapterError(
            f"{root} has no folder {missing[0]}; it should have {', '.join(STYLES)}"
        )
    parts: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for folder in sorted(path for path in (root / STYLES[0]).iterdir() if path.is_dir()):
        for number, file in enumerate(sorted(folder.iterdir())):
            part = PARTS[number % len(PARTS)]
            parts[part].append((PICTURES / file.relative_to(root), folder.name))
    out.mkdir(parents=True, exist_ok=True)
    link = out / PICTURES
    try:
        if link.is_symlink():
            link.unlink()
        link.symlink_to(root.resolve(), target_is_directory=True)
    except OSError as error:
        raise RAdapterError(
            f"can't link {link} to {root}: {error.strerror}; give another folder OUT"
        ) from None
    for part, rows in parts.items():
        with (out / f"{part}.csv").open("w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows([("image", "label"), *rows])
    sets = [
        {"name": "photo, validation", "data": "csv:validation.csv", "split": "validation"},
        {
            "name": f"{CHOOSES}, validation",
            "data": f"imagefolder:{PICTURES / CHOOSES}",
            "shift": "ood",
            "split": "validation",
        },
        {"name": STYLES[0], "data": "csv:test.csv", "shift": "id"},
        *(
            {"name": style, "data": f"imagefolder:{PICTURES / style}", "shift": "ood"}
            for style in STYLES[1:]
            if style != CHOOSES
        ),
    ]
    train = {
        "data": "csv:train.csv",
        "templates": "simple",  # as in the suite
        "batch_size": 64,
        "epochs": 10,
        "crop_scale": 0.7,
        "flip": True,
        "workers": 0,
    }
    path = out / "benchmark.yaml"
    write_benchmark(path, {"name": "PACS", "templates": "simple", "sets": sets}, train)
    print(f"wrote {path}; next: python -m rivals.table 1 --data {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(pacs, argv, prog="python -m rivals.pacs")


if __name__ == "__main__":
    sys.exit(main())
