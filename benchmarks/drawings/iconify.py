"""The npm package @iconify/json, read: sets of drawings with their names, licences and styles."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

VERSION = "2.2.535"
# licences that let anyone pass the drawings on, changed or not; those that ask for the same licence
# are only tested on
LICENCES = (
    *(
        "Apache-2.0",
        "BSD-3-Clause",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MPL-2.0",
        "OFL-1.1",
    ),
    "Unlicense",
)
SHARE_ALIKE = ("CC-BY-SA-3.0", "CC-BY-SA-4.0")
STYLE_WORDS = {
    "line": "outline outlined line linear stroke lined regular light thin",
    "filled": "filled fill solid bold flat",
    "two-tone": "duotone twotone duo poly",
    "": (
        "alt baseline black broken bulk curved fluent freehand glyph ic icon icons l ltr monochrome"
        " o poly r remix rtl round rounded s sharp sq tone variant"
    ),
}
_STYLE_OF = {word: style for style, words in STYLE_WORDS.items() for word in words.split()}
_SIZES = {"8", "10", "12", "14", "15", "16", "20", "24", "28", "32", "36", "48", "64", "96"}
_SIZE = re.compile(r"\d+(px|x)")
_MOST_BYTES = 200_000  # of one drawing's SVG; a few photographs in disguise are larger


@dataclass(frozen=True)
class Drawing:
    """One drawing of a set.

    Attributes:
        source: name of its set.
        name: its name in the set.
        words: what the name says without style, size and number: "credit card".
        number: the second "camera" of a set is another drawing of the same words; "" of the first.
        style: `line`, `filled`, `two-tone`, or "" where the name does not say it.
        svg: a whole SVG document; black where the drawing has no colours of its own.
    """

    source: str
    name: str
    words: str
    number: str
    style: str
    svg: str


@dataclass(frozen=True)
class Source:
    """A set of drawings, and whom to credit.

    Attributes:
        name: prefix of the set, such as `tabler`.
        title: its name in words.
        author: who drew it.
        url: of the author or the set.
        licence: SPDX name.
        colour: whether its drawings have colours of their own.
    """

    name: str
    title: str
    author: str
    url: str
    licence: str
    colour: bool


def sources(package: Path) -> dict[str, Source]:
    """All sets of the package whose licence lets anyone pass the drawings on.

    Args:
        package: the unpacked npm package, with `collections.json` and `json/`.
    """
    listed = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    found = {}
    for name, facts in sorted(listed.items()):
        licence = facts["license"]
        author = facts["author"]
        spdx = licence.get("spdx", "")
        if spdx in (*LICENCES, *SHARE_ALIKE):
            url = author.get("url") or licence.get("url", "")
            found[name] = Source(
                name, facts["name"], author["name"], url, spdx, bool(facts.get("palette"))
            )
    return found


def drawings(package: Path, source: str) -> Iterator[Drawing]:
    """The drawings of one set, in the order of their names; hidden, turned and oversized ones are
    left out.
    """
    found: dict[str, Any] = json.loads(
        (package / "json" / f"{source}.json").read_text(encoding="utf-8")
    )
    for name, icon in sorted(found["icons"].items()):
        words, number, style = read_name(name)
        if not words or icon.get("hidden") or {"rotate", "hFlip", "vFlip"} & icon.keys():
            continue
        left, top, width, height = (
            icon.get(key, found.get(key, default))
            for key, default in zip(_BOX, (0, 0, 16, 16), strict=True)
        )
        if len(icon["body"]) <= _MOST_BYTES:
            head = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
                ' color="#000" '
            )
            box = f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            yield Drawing(source, name, words, number, style, f"{head}{box}{icon['body']}</svg>")


_BOX = ("left", "top", "width", "height")


def read_name(name: str) -> tuple[str, str, str]:
    """What a drawing's name says: its words, its number, its style.

    Args:
        name: such as `credit-card-2-outline-24`.

    Returns:
        Such as ("credit card", "2", "line").
    """
    words = []
    number = ""
    style = ""
    for word in re.split(r"[^a-z0-9]+", name.lower()):
        if word in _STYLE_OF:
            style = _STYLE_OF[word] if style != "two-tone" and _STYLE_OF[word] else style
        elif word and not _SIZE.fullmatch(word) and word not in _SIZES:
            text, digits = re.fullmatch(r"(.*?)(\d*)", word).groups()  # type: ignore[union-attr]
            number = digits or number
            words += [text] if text else []
    return " ".join(words), number, style


def render(svg: str, side: int) -> NDArray[np.uint8] | None:
    """An SVG as premultiplied RGBA pixels [side, side, 4], centred; None where nothing is drawn or
    it can't be read.
    """
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
    except ValueError:
        return None
    with Image.open(io.BytesIO(png)) as image:
        drawn = np.asarray(image.convert("RGBa"))
    high, wide = drawn.shape[:2]
    if max(high, wide) > side:  # a drawing many times as long as wide
        return None
    square = np.zeros((side, side, 4), np.uint8)
    top = (side - high) // 2
    left = (side - wide) // 2
    square[top : top + high, left : left + wide] = drawn
    return square if (square[..., 3] > 64).mean() > 0.01 else None
