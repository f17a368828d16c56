"""The demo's data: a few hundred words, each drawn by many hands, as image folders.

The drawings lie beside this file as SVG, by their places in the benchmark of drawings, whose
folders these are. Where
each comes from and its licence: `ATTRIBUTION.md`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import lzma
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from radapter_serve.errors import RAdapterError
from radapter_serve.extras import install_command

BASE = Path(__file__).parent / "base"
DRAWINGS = Path(__file__).parent / "drawings"
CLASSES = DRAWINGS / "classes.txt"
TEMPLATES = DRAWINGS / "templates.txt"
STYLES = {
    "colour": "in colour",
    "line": "line drawings",
    "filled": "filled",
    "two-tone": "two-tone",
    "pixel": "pixel art",
    "hand-drawn": "hand-drawn",
    "silhouettes": "silhouettes, white on black",
    "emoji-noto": "Google's Noto emoji",
    "emoji-twemoji": "Twitter's Twemoji",
    "emoji-fluent": "Microsoft's Fluent emoji",
}
FINE_TUNED = "colour"  # the one style that the demo fine-tunes on
SHIFTS = tuple(style for style in STYLES if style != FINE_TUNED)
ON_BLACK = ("silhouettes",)
SIDE = 96  # pixels


@dataclass(frozen=True)
class DemoData:
    """Image folders (FOLDER/CLASS/*.png) and the files that go with them.

    Attributes:
        train: drawings in colour, to fine-tune on.
        val: the same style, other drawings.
        test: by style; `colour` is in distribution. Neither the base nor fine-tuning has seen any
            of these drawings, nor the hands that drew the other styles.
        classes: label file, one class a line, synonyms after commas.
        templates: prompt templates, one a line.
    """

    train: Path
    val: Path
    test: dict[str, Path]
    classes: Path
    templates: Path


def drawings(shipped: Path = DRAWINGS) -> dict[str, str]:
    """All drawings as SVG, by their places: `train/CLASS/SET--NAME.svg`, and so in `val`, `test`,
    `shifts/STYLE`.

    Args:
        shipped: folder that `benchmarks.drawings.ship` wrote.
    """
    return _read(shipped)


@functools.cache
def _read(shipped: Path) -> dict[str, str]:
    with lzma.open(shipped / "drawings.json.xz", "rt", encoding="utf-8") as file:
        found: dict[str, str] = json.load(file)
    return found


def drawings_of(place: str) -> dict[str, list[str]]:
    """The SVG documents of a place by class, such as those of `train` or `shifts/line`."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, svg in drawings().items():
        folder, class_name, _ = path.rsplit("/", 2)
        if folder == place:
            found[class_name].append(svg)
    return dict(found)


def place_of(style: str) -> str:
    """Where the test drawings of a style are: `test` or `shifts/STYLE`."""
    return "test" if style == FINE_TUNED else f"shifts/{style}"


def render(svg: str, side: int) -> Image.Image:
    """An SVG as a square RGBA image, `side` pixels wide, transparent where nothing is drawn.

    Raises:
        RAdapterError: the renderer is not installed.
        ValueError: it can't read the SVG.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise RAdapterError(
            f"resvg-py, which draws, is not installed; {install_command('demo')}"
        ) from error
    with Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))
    ) as image:
        drawn = image.convert("RGBA")
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def on_paper(drawn: NDArray[np.uint8], *, black: bool = False) -> Image.Image:
    """Premultiplied RGBA pixels [S, S, 4] on white paper, as RGB; on black paper what is black
    becomes white.
    """
    on_white = drawn[..., :3] + (255 - drawn[..., 3:])
    return Image.fromarray(255 - on_white if black else on_white)


def prepare(folder: str | Path, *, shipped: Path = DRAWINGS, quiet: bool = False) -> DemoData:
    """Draw the demo's image folders; a folder that is there already is taken as it is.

    Args:
        folder: is made, whole or not at all.
        shipped: folder of the drawings as SVG, their classes and templates.
        quiet: no progress bar.

    Raises:
        RAdapterError: the renderer is not installed, or the folder can't be written or holds
            something else.
    """
    folder = Path(folder)
    test = {style: folder / place_of(style) for style in STYLES}
    if not (folder / CLASSES.name).is_file():
        with made_whole(folder, "images") as part:
            found = drawings(shipped)
            for place, svg in track(found.items(), "Drawing the images", disable=quiet):
                path = (part / place).with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                black = path.parts[-3] in ON_BLACK
                on_paper(np.asarray(render(svg, SIDE).convert("RGBa")), black=black).save(path)
            for file in (CLASSES, TEMPLATES):
                shutil.copyfile(shipped / file.name, part / file.name)
    elif not all(place.is_dir() for place in test.values()):
        raise RAdapterError(
            f"{folder} was made by another version of the demo; remove it, or name another --out"
        )
    return DemoData(
        folder / "train", folder / "val", test, folder / CLASSES.name, folder / TEMPLATES.name
    )


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
    """In words, the style that a set of drawings or scenes is named after, and what follows the
    name's comma.

    Args:
        name: of STYLES, as in `color` or `color, dense`, or any other name, which is given back.
    """
    style, _, rest = name.partition(", ")
    label = STYLES.get(style, style) + (f", {rest}" if rest else "")
    return label + (" (in distribution)" if name == FINE_TUNED else "")
