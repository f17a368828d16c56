"""The demo's data: a few hundred words, each drawn by many hands, as image folders.

The drawings are in this folder as SVG, with their paths in the benchmark of drawings. Sources and
licences: `ATTRIBUTION.md`.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import lzma
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.errors import RAdapterError, install_command
from radapter_serve.files import disk_errors, staged_folder

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
SIDE = 96  # of a drawing, in pixels
Split = Literal["train", "val", "test"]
# A scene is a square of 2 x 2 cells; a cell has a drawing or is empty.
CELL = 80
CELLS = 2
SIDES = (60, 81)  # range of a drawing's side in pixels, its end excluded
TRAIN = 600  # scenes
TEST = 100  # scenes of each style
CLASSES_SHOWN = 48  # more classes make segmentation slower
CAPTIONS = 2  # of each scene: the first with the names of the classes, the second with synonyms
SCENE_SHIFTS = ("filled", "emoji-noto")
SHORT_SIDE = 96  # pixels, of dense segmentation: a drawing of a scene is then as large as a window
PAPERS = ("white", "#fdf6e3", "#eaf2fb", "#edf7ed", "#fbeaf0", "#f1f1f1")
KINDS = ("a drawing", "a picture", "an icon")


@dataclass(frozen=True)
class DemoData:
    """Image folders (FOLDER/CLASS/*.png), and the files that go with them."""

    train: Path  # drawings in colour
    val: Path  # the same style, other drawings
    # By style; `colour` is in distribution. Neither the base nor the fine-tuning has seen these
    # drawings, nor any drawing by the hands of the shifted styles.
    test: dict[str, Path]
    classes: Path  # label file
    templates: Path  # of prompts


@functools.cache
def drawings(shipped: Path = DRAWINGS) -> dict[str, str]:
    """All drawings as SVG by path, such as `train/CLASS/SET--NAME.svg` or `shifts/STYLE/...`."""
    with lzma.open(shipped / "drawings.json.xz", "rt", encoding="utf-8") as file:
        documents: dict[str, str] = json.load(file)
    return documents


def drawings_of(place: str) -> dict[str, list[str]]:
    """The SVG documents of a place, such as `train` or `shifts/line`, by class."""
    documents: dict[str, list[str]] = defaultdict(list)
    for path, svg in drawings().items():
        folder, class_name, _ = path.rsplit("/", 2)
        if folder == place:
            documents[class_name].append(svg)
    return dict(documents)


def place_of(style: str) -> str:
    """The place of a style's test drawings: `test` or `shifts/STYLE`."""
    return "test" if style == FINE_TUNED else f"shifts/{style}"


def render(svg: str, side: int) -> Image.Image:
    """Render an SVG as a square RGBA image, `side` pixels wide, with a transparent ground."""
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
    """Put premultiplied RGBA pixels [S, S, 4] on white paper; `black` inverts the result."""
    on_white = drawn[..., :3] + (255 - drawn[..., 3:])
    return Image.fromarray(255 - on_white if black else on_white)


def prepare(
    folder: str | Path, *, styles: Sequence[str] = tuple(STYLES), shipped: Path = DRAWINGS
) -> DemoData:
    """Draw the demo's missing image folders, each atomically; `styles` are those to test."""
    folder = Path(folder)
    test = {style: folder / place_of(style) for style in styles}
    places = ["train", "val", *map(place_of, styles)]
    missing = [place for place in places if not (folder / place).is_dir()]
    for place in track(missing, "Drawing the images", disable=not missing):
        with disk_errors(folder), staged_folder(folder / place, "radapter-demo") as part:
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


def style_of(name: str) -> str:
    """The style that a set is named after, in words: `line, dense` is `line drawings, dense`."""
    style, _, rest = name.partition(", ")
    label = STYLES.get(style, style) + (f", {rest}" if rest else "")
    return label + (" (in distribution)" if name == FINE_TUNED else "")


@dataclass(frozen=True)
class Scene:
    """A picture of several drawings."""

    image: Image.Image
    mask: NDArray[np.uint8]  # class number of each pixel; paper has the number after the last class
    shown: Sequence[str]  # classes of the drawings, with synonyms after commas


@dataclass(frozen=True)
class SceneData:
    """Folders with `images/`, `masks/` of the classes' lines, from 0, and `captions.csv`."""

    train: Path
    test: dict[str, Path]  # by style, with the same classes at the same places
    classes: Path  # class file, without the paper
    gallery: Path  # CSV of all test scenes: image, style, caption


def prepare_scenes(folder: str | Path, *, train: int = TRAIN, test: int = TEST) -> SceneData:
    """Compose the demo's missing scenes: `train` to train on, and `test` of each style."""
    folder = Path(folder)
    tests = {style: folder / f"test-{style}" for style in (FINE_TUNED, *SCENE_SHIFTS)}
    wanted: list[tuple[Path, Split, str, int]] = [(folder / "train", "train", FINE_TUNED, train)]
    wanted += [(place, "test", style, test) for style, place in tests.items()]
    missing = [scenes for scenes in wanted if scenes[3] and not scenes[0].is_dir()]
    for place, split, style, count in track(missing, "Composing the scenes", disable=not missing):
        with disk_errors(folder), staged_folder(place, "radapter-demo") as part:
            write_scenes(part, compose(split, style, count, seed=0), seed=0)

    # List the test scenes with the captions that name the classes.
    classes = folder / "classes.txt"
    gallery = folder / "gallery.csv"
    if missing or not gallery.is_file():
        classes.write_text("\n".join(scene_classes()) + "\n", encoding="utf-8")
        with gallery.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "style", "caption"])
            for style, place in tests.items():
                with (place / "captions.csv").open(encoding="utf-8", newline="") as captions_of:
                    rows = list(csv.DictReader(captions_of))
                for row in rows[::CAPTIONS]:
                    table.writerow([f"{place.name}/{row['image']}", style, row["caption"]])
    return SceneData(folder / "train", tests, classes, gallery)


@functools.cache
def scene_classes() -> tuple[str, ...]:
    """The classes of scenes, as lines: those with the most drawings, and some in every style."""
    train, *tests = (
        drawings_of(place) for place in ("train", *map(place_of, (FINE_TUNED, *SCENE_SHIFTS)))
    )
    drawn = [name for name in train if all(name in test for test in tests)]
    most = sorted(drawn, key=lambda name: (-len(train[name]), name))[:CLASSES_SHOWN]
    return tuple(line for line in read_label_file(CLASSES) if split_label(line)[0] in most)


@functools.cache
def rendered(svg: str) -> Image.Image:
    """Render a drawing at a cell's size, as RGBA; cached."""
    return render(svg, CELL)


def compose(split: Split, style: str, count: int, seed: int) -> Iterator[Scene]:
    """Compose scenes of two to four drawings of different classes, which are the same, and at the
    same places, in every style.
    """
    classes = scene_classes()
    draw = random.Random(seed)
    by_class = drawings_of(place_of(style) if split == "test" else split)
    drawn_classes = [line for line in classes if split_label(line)[0] in by_class]
    corners = [(x * CELL, y * CELL) for x in range(CELLS) for y in range(CELLS)]
    for _ in range(count):
        image = Image.new("RGB", (CELLS * CELL, CELLS * CELL), draw.choice(PAPERS))
        mask = np.full((image.height, image.width), len(classes), np.uint8)
        chosen = draw.sample(corners, draw.randint(2, len(corners)))
        shown = draw.sample(drawn_classes, len(chosen))
        for (left, top), line in zip(chosen, shown, strict=True):
            side = draw.randrange(*SIDES)
            x = left + draw.randint(0, CELL - side)
            y = top + draw.randint(0, CELL - side)
            svgs = by_class[split_label(line)[0]]
            # `random` takes one draw whatever the number of drawings, so that styles stay alike.
            drawn = rendered(svgs[int(draw.random() * len(svgs))])
            drawn = drawn.resize((side, side), Image.Resampling.LANCZOS)
            image.paste(drawn, (x, y), drawn)
            # The mask is where the drawing is more than half opaque.
            inside = np.asarray(drawn.getchannel("A")) >= 128
            mask[y : y + side, x : x + side][inside] = classes.index(line)
        yield Scene(image, mask, shown)


def captions(shown: Sequence[str], draw: random.Random) -> list[str]:
    """Two captions of a scene, in random order: by the names of the classes, and by synonyms."""

    def sentence(words: list[str]) -> str:
        draw.shuffle(words)
        return f"{draw.choice(KINDS)} of {', '.join(words[:-1])} and {words[-1]}"

    names = [split_label(line) for line in shown]
    return [
        sentence([name for name, *_ in names]),
        sentence([draw.choice(synonyms) for synonyms in names]),
    ]


def write_scenes(folder: Path, scenes: Iterator[Scene], seed: int) -> None:
    """Write scenes as `images/`, `masks/` and `captions.csv`; the seed draws the captions."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for index, scene in enumerate(scenes):
            scene.image.save(folder / "images" / f"{index:03}.png")
            Image.fromarray(scene.mask).save(folder / "masks" / f"{index:03}.png")
            for caption in captions(scene.shown, random.Random(f"{seed}-{index}")):
                table.writerow([f"images/{index:03}.png", caption])
