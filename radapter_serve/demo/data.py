"""The demo's data: a few hundred words, each drawn by many hands, as image folders.

The drawings are in this folder as SVG, under their places in the benchmark of drawings. Sources and
licences: `ATTRIBUTION.md`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import lzma
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from radapter_serve.errors import RAdapterError, install_command

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
FINE_TUNED = "colour"  # the style that the demo fine-tunes on
SHIFTS = tuple(style for style in STYLES if style != FINE_TUNED)
ON_BLACK = "silhouettes"
SIDE = 96  # pixels


@dataclass(frozen=True)
class DemoData:
    """Image folders (FOLDER/CLASS/*.png), and the files that go with them."""

    train: Path  # drawings in colour
    val: Path  # the same style, other drawings
    # By style; `colour` is in distribution. Neither the base nor fine-tuning has seen these
    # drawings, or other drawings by the hands of the shifted styles.
    test: dict[str, Path]
    classes: Path  # label file
    templates: Path  # of prompts


@functools.cache
def drawings(shipped: Path = DRAWINGS) -> dict[str, str]:
    """All drawings as SVG by their places: `train/CLASS/SET--NAME.svg`, and so in `val`, `test`,
    `shifts/STYLE`.
    """
    with lzma.open(shipped / "drawings.json.xz", "rt", encoding="utf-8") as file:
        documents: dict[str, str] = json.load(file)
    return documents


def drawings_of(place: str) -> dict[str, list[str]]:
    """The SVG documents of a place by class, such as those of `train` or `shifts/line`."""
    documents: dict[str, list[str]] = defaultdict(list)
    for path, svg in drawings().items():
        folder, class_name, _ = path.rsplit("/", 2)
        if folder == place:
            documents[class_name].append(svg)
    return dict(documents)


def place_of(style: str) -> str:
    """Where the test drawings of a style are: `test` or `shifts/STYLE`."""
    return "test" if style == FINE_TUNED else f"shifts/{style}"


def render(svg: str, side: int) -> Image.Image:
    """Render an SVG as a square RGBA image, `side` pixels wide, transparent where nothing is
    drawn.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise RAdapterError(
            f"resvg-py, which renders the drawings, is not installed; {install_command('demo')}"
        ) from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
    with Image.open(io.BytesIO(png)) as image:
        drawn = image.convert("RGBA")
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def on_paper(drawn: NDArray[np.uint8], *, black: bool = False) -> Image.Image:
    """Put premultiplied RGBA pixels [S, S, 4] on white paper, as RGB; on black paper what is black
    becomes white.
    """
    on_white = drawn[..., :3] + (255 - drawn[..., 3:])
    return Image.fromarray(255 - on_white if black else on_white)


def prepare(
    folder: str | Path,
    *,
    styles: Sequence[str] = tuple(STYLES),
    shipped: Path = DRAWINGS,
    quiet: bool = False,
) -> DemoData:
    """Draw the demo's image folders, each whole or not at all; those that are there already are
    taken as they are. `styles` are those of the test drawings.
    """
    folder = Path(folder)
    test = {style: folder / place_of(style) for style in styles}
    places = ["train", "val", *map(place_of, styles)]
    missing = [place for place in places if not (folder / place).is_dir()]
    for place in track(missing, "Drawing the images", disable=quiet or not missing):
        with made_whole(folder / place, "images") as part:
            for path, svg in drawings(shipped).items():
                start, class_name, name = path.rsplit("/", 2)
                if start == place:
                    (part / class_name).mkdir(parents=True, exist_ok=True)
                    pixels = np.asarray(render(svg, SIDE).convert("RGBa"))
                    drawn = on_paper(pixels, black=place.endswith(ON_BLACK))
                    drawn.save((part / class_name / name).with_suffix(".png"))
    for file in (CLASSES, TEMPLATES):
        if not (folder / file.name).is_file():
            shutil.copyfile(shipped / file.name, folder / file.name)
    return DemoData(
        folder / "train", folder / "val", test, folder / CLASSES.name, folder / TEMPLATES.name
    )


@contextlib.contextmanager
def made_whole(folder: Path, what: str) -> Iterator[Path]:
    """Yield a new folder to fill, which replaces `folder` on success; nothing is left otherwise."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except OSError as error:
        raise RAdapterError(f"could not make the demo's {what} in {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def style_of(name: str) -> str:
    """The style that a set is named after, in words: `colour, dense` is `in colour, dense (in
    distribution)`.
    """
    style, _, rest = name.partition(", ")
    label = STYLES.get(style, style) + (f", {rest}" if rest else "")
    return label + (" (in distribution)" if name == FINE_TUNED else "")
