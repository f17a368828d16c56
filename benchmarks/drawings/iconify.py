"""The drawings of the npm package @iconify/json: sets with their names, licences and styles; which
set is for what; the class that a name means; drawings that are nearly the same; and whom to credit.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
import yaml
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.labels import read_label_file, split_label

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
    """One drawing of a set."""

    source: str  # name of its set
    name: str  # its name in the set
    words: str  # what the name says without style, size and number: "credit card"
    # the second "camera" of a set is another drawing of the same words; "" of the first
    number: str
    style: str  # `line`, `filled`, `two-tone`, or "" where the name does not say it
    svg: str  # a whole SVG document; black where the drawing has no colours of its own


@dataclass(frozen=True)
class Source:
    """A set of drawings, and whom to credit."""

    name: str  # prefix of the set, such as `tabler`
    title: str  # its name in words
    author: str  # who drew it
    url: str  # of the author or the set
    licence: str  # SPDX name
    colour: bool  # whether its drawings have colours of their own


def sources(package: Path) -> dict[str, Source]:
    """All sets of the package whose licence lets anyone pass the drawings on."""
    listed = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    sources = {}
    for name, facts in sorted(listed.items()):
        licence = facts["license"]
        author = facts["author"]
        spdx = licence.get("spdx", "")
        if spdx in (*LICENCES, *SHARE_ALIKE):
            url = author.get("url") or licence.get("url", "")
            sources[name] = Source(
                name, facts["name"], author["name"], url, spdx, bool(facts.get("palette"))
            )
    return sources


def drawings(package: Path, source: str) -> Iterator[Drawing]:
    """The drawings of one set, in the order of their names; hidden, turned and oversized ones are
    left out.
    """
    package_icons: dict[str, Any] = json.loads(
        (package / "json" / f"{source}.json").read_text(encoding="utf-8")
    )
    for name, icon in sorted(package_icons["icons"].items()):
        words, number, style = read_name(name)
        if not words or icon.get("hidden") or {"rotate", "hFlip", "vFlip"} & icon.keys():
            continue
        left, top, width, height = (
            icon.get(key, package_icons.get(key, default))
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
    """Read a name: `credit-card-2-outline-24` is ("credit card", "2", "line")."""
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


CLASSES = Path(__file__).with_name("classes.txt")
SYNONYMS = Path(__file__).with_name("synonyms.txt")
_WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
BESIDE, INSTEAD, ONE_WAY = (
    frozenset(_WORDS[kind].split()) for kind in ("beside", "instead", "one_way")
)
MOST_WORDS = 3  # of a name whose last words are a class: "old alarm clock"


def load_meanings(path: Path) -> dict[str, str]:
    """Read the meaning of each name. A line of the file is `meaning, synonyms for prompts | other
    names of drawings`.
    """
    meanings: dict[str, str] = {}
    for line in read_label_file(path):
        names = split_label(line.replace("|", ","))
        for name in names:
            if meanings.setdefault(name, names[0]) != names[0]:
                raise ValueError(f"{path}: {name!r} means both {meanings[name]!r} and {names[0]!r}")
    return meanings


class Classes:
    """The benchmark's classes, and all names that drawings of them have."""

    def __init__(self, classes: Path = CLASSES, synonyms: Path = SYNONYMS) -> None:
        of_classes = load_meanings(classes)
        self.names = sorted(set(of_classes.values()))
        lines = [line.partition("|")[0].strip() for line in read_label_file(classes)]
        self.prompt_lines = sorted(lines, key=lambda line: split_label(line)[0])
        self.meanings = {**load_meanings(synonyms), **of_classes}
        self._known = frozenset(self.names)

    def of(self, words: str) -> str | None:
        """The class that a drawing's name means, or None.

        It is named by a synonym, alone ("magnifying glass"), beside words that change nothing
        ("camera off"), or at the end of a few words that name nothing else that is known ("war
        axe"). One of many counts as one ("clouds").
        """
        meaning = _named(words, self.meanings)
        parts = words.split()
        if meaning is None and INSTEAD.isdisjoint(parts):
            mentions = _mentions(parts, self.meanings)
            if len(mentions) == 1:
                start, end, named = mentions[0]
                last = end == len(parts) and len(parts) <= MOST_WORDS
                meaning = named if last or BESIDE.issuperset(parts[:start] + parts[end:]) else None
        return meaning if meaning in self._known else None


def core(words: str) -> str:
    """A name without the words that change nothing: "camera" of "camera off circle"."""
    return " ".join(word for word in words.split() if word not in BESIDE) or words


def _named(words: str, meanings: Mapping[str, str]) -> str | None:
    return meanings.get(words) or meanings.get(words.removesuffix("s"))


def _mentions(parts: list[str], meanings: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Find names from the left, the longest first: start, end, meaning. A word of `BESIDE` by
    itself is none.
    """
    spans = []
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            meaning = _named(" ".join(parts[start:end]), meanings)
            if meaning and not (end - start == 1 and parts[start] in BESIDE):
                spans.append((start, end, meaning))
                start = end - 1
                break
        start += 1
    return spans


ROLES = Path(__file__).with_name("roles.yaml")


@dataclass(frozen=True)
class Style:
    """Drawings of one style, by several hands."""

    name: str  # of the style, such as `two-tone`
    # name of each set, with the style that its drawings' names must say; None takes all of them
    sets: dict[str, str | None]
    paper: str = "white"  # `white` or `black`, on which black drawings become white ones


@dataclass(frozen=True)
class Roles:
    """Which set is for what."""

    fine_tuned: Style  # the style to fine-tune on
    shifts: tuple[Style, ...]  # the styles that are tested on alone
    base_validation: frozenset[str]  # sets of the base's own validation
    unused: frozenset[str]  # sets for nothing
    # those of them whose names are the brands to leave out of all other sets
    brands: tuple[str, ...]

    @property
    def held_out(self) -> frozenset[str]:
        """The sets that no pair may come from."""
        return (
            frozenset(name for style in (self.fine_tuned, *self.shifts) for name in style.sets)
            | self.unused
        )


def load_roles(path: Path = ROLES) -> Roles:
    """Read the file of roles."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    styles = [
        Style(
            entry["name"],
            {item["set"]: item.get("style") for item in entry["sets"]},
            entry.get("paper", "white"),
        )
        for entry in (document["fine_tuned"], *document["shifts"])
    ]
    unused = [name for family in document["unused"] for name in family]
    named = [
        *(name for style in styles for name in style.sets),
        *document["base_validation"],
        *unused,
    ]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: {', '.join(twice)} stand twice; a set has one role")
    return Roles(
        styles[0],
        tuple(styles[1:]),
        frozenset(document["base_validation"]),
        frozenset(unused),
        tuple(document["brands"]),
    )


SMALL = 20  # side of the small picture that is compared
ALIKE = 0.9  # correlation of two small pictures, from which on they count as one drawing


def signature(drawn: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Make what a drawing is compared by, float32 [400] of mean 0 and length 1: how dark it is on
    white paper, cut to its ink, made small. `drawn` is premultiplied RGBA, uint8 [S, S, 4].
    """
    alpha = drawn[..., 3].astype(np.float32)
    ink = alpha - drawn[..., :3].astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)
    rows, columns = (np.flatnonzero((alpha > 64).any(axis=axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)  # padded to a square, so that a flat drawing is not like a high one
    square = np.zeros((side, side), np.float32)
    top = (side - cut.shape[0]) // 2
    left = (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    small = np.asarray(
        Image.fromarray(square).resize((SMALL, SMALL), Image.Resampling.BOX), np.float32
    ).ravel()
    small = small - small.mean()
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-6), np.float32)


def alike(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of the signatures [N, 400] are nearly the same as which of the others [M, 400]: bool
    [N, M].
    """
    return np.asarray(first @ second.T >= ALIKE)


def clusters(signatures: NDArray[np.float32], groups: list[str]) -> list[list[int]]:
    """Number what belongs together, from signatures float32 [N, 400]: drawings of one group, those
    that are nearly the same, and whatever is joined by these.
    """
    together = alike(signatures, signatures) | np.array([[a == b for b in groups] for a in groups])
    parts: list[list[int]] = []
    left = set(range(len(groups)))
    while left:
        members = set()
        edge = {min(left)}
        while edge:
            members |= edge
            edge = {
                int(other) for number in edge for other in np.flatnonzero(together[number])
            } - members
        parts.append(sorted(members))
        left -= members
    return parts


def attribution(title: str, used: Mapping[str, int], credited: Mapping[str, Source]) -> str:
    """A Markdown table of the sets."""
    lines = [
        f"# {title}",
        "",
        "| set | drawings | title | author | licence |",
        "|---|---|---|---|---|",
    ]
    for name, count in sorted(used.items()):
        source = credited[name]
        author = f"[{source.author}]({source.url})" if source.url else source.author
        lines.append(f"| `{name}` | {count:,} | {source.title} | {author} | {source.licence} |")
    return "\n".join(lines).replace("|  |", "| |") + "\n"
