"""The demo's scenes: drawings of different classes on coloured paper, with their exact masks and
with captions.
"""

from __future__ import annotations

import csv
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.demo.data import CLASSES, FINE_TUNED, drawings_of, made_whole, place_of, render

Split = Literal["train", "test"]

# a scene is a square of 2 x 2 cells, each with a drawing or none
CELL = 80
CELLS = 2
SIDES = (60, 81)  # pixels of a drawing, from and below
# scenes
TRAIN = 600
TEST = 100
CLASSES_SHOWN = 48  # the work of segmentation grows with them
CAPTIONS = (
    2  # of each scene; the first has the names of the classes, the second their synonyms, too
)
SCENE_SHIFTS = ("filled", "emoji-noto")
SHORT_SIDE = 96  # pixels, of dense segmentation: a scene's drawings are as large as a window then
PAPERS = ("white", "#fdf6e3", "#eaf2fb", "#edf7ed", "#fbeaf0", "#f1f1f1")
KINDS = ("a drawing", "a picture", "an icon")


@dataclass(frozen=True)
class Scene:
    """Drawings side by side.

    Attributes:
        image: RGB.
        mask: uint8 [H, W], the number of a pixel's class; one more than the last for the paper.
        shown: the drawings' classes, synonyms after commas.
    """

    image: Image.Image
    mask: NDArray[np.uint8]
    shown: Sequence[str]


@dataclass(frozen=True)
class SceneData:
    """Folders with `images/`, `masks/` and `captions.csv`; a mask holds the line of a pixel's class
    in the class file.

    Attributes:
        train: scenes of training drawings.
        test: by style, scenes of test drawings; scene for scene the same classes at the same places
            in all styles.
        classes: class file, synonyms after commas; the paper is none of them.
        gallery: CSV of all test scenes: image, style, caption.
    """

    train: Path
    test: dict[str, Path]
    classes: Path
    gallery: Path


def prepare_scenes(
    folder: str | Path,
    *,
    train: int = TRAIN,
    test: int = TEST,
    seed: int = 0,
    quiet: bool = False,
) -> SceneData:
    """Compose the demo's scenes; a folder that is there already is taken as it is.

    Args:
        folder: is made, whole or not at all.
        train: scenes to train on.
        test: scenes of each style to test on.
        seed: of what is shown where.
        quiet: no progress bar.

    Raises:
        RAdapterError: the renderer is not installed, or the folder can't be written.
    """
    folder = Path(folder)
    places: list[tuple[str, Split, str, int]] = [("train", "train", FINE_TUNED, train)]
    places += [(f"test-{style}", "test", style, test) for style in (FINE_TUNED, *SCENE_SHIFTS)]
    if not (folder / "classes.txt").is_file():
        with made_whole(folder, "scenes") as part:
            for place, split, style, count in track(places, "Composing the scenes", disable=quiet):
                _write(part / place, compose(split, style, count, seed), seed)
            _write_gallery(part)
            (part / "classes.txt").write_text("\n".join(scene_classes()) + "\n", encoding="utf-8")
    tests = {style: folder / f"test-{style}" for style in (FINE_TUNED, *SCENE_SHIFTS)}
    return SceneData(folder / "train", tests, folder / "classes.txt", folder / "gallery.csv")


@functools.cache
def scene_classes() -> tuple[str, ...]:
    """The classes of scenes, as lines with synonyms after commas.

    Every style of scenes has drawings of them, and of such classes they have the most drawings to
    learn from.
    """
    train, *tests = (
        drawings_of(place) for place in ("train", *map(place_of, (FINE_TUNED, *SCENE_SHIFTS)))
    )
    drawn = [name for name in train if all(name in of for of in tests)]
    most = sorted(drawn, key=lambda name: (-len(train[name]), name))[:CLASSES_SHOWN]
    return tuple(line for line in read_label_file(CLASSES) if split_label(line)[0] in most)


@functools.cache
def rendered(svg: str) -> Image.Image:
    """A drawing at a cell's size, as RGBA, drawn once."""
    return render(svg, CELL)


def compose(
    split: Split,
    style: str,
    count: int,
    seed: int,
    *,
    sides: tuple[int, int] = SIDES,
    draw_svg: Callable[[str], Image.Image] = rendered,
) -> Iterator[Scene]:
    """Scenes of two to four drawings, each of another class.

    Args:
        split: whose drawings are shown.
        style: of these; the same seed shows the same classes at the same places in every style.
        count: of the scenes.
        seed: of what is shown where.
        sides: pixels of a drawing, from and below; a cell's at most.
        draw_svg: draws an SVG document as RGBA.
    """
    classes = scene_classes()
    draw = random.Random(seed)
    by_class = drawings_of("train" if split == "train" else place_of(style))
    corners = [(x * CELL, y * CELL) for x in range(CELLS) for y in range(CELLS)]
    for _ in range(count):
        image = Image.new("RGB", (CELLS * CELL, CELLS * CELL), draw.choice(PAPERS))
        mask = np.full((image.height, image.width), len(classes), np.uint8)
        chosen = draw.sample(corners, draw.randint(2, len(corners)))
        shown = draw.sample(classes, len(chosen))
        for (left, top), line in zip(chosen, shown, strict=True):
            side = draw.randrange(*sides)
            x = left + draw.randint(0, CELL - side)
            y = top + draw.randint(0, CELL - side)
            svgs = by_class[split_label(line)[0]]
            # a draw that is as long in every style
            drawn = draw_svg(svgs[int(draw.random() * len(svgs))])
            drawn = drawn.resize((side, side), Image.Resampling.LANCZOS)
            image.paste(drawn, (x, y), drawn)
            mask[y : y + side, x : x + side][inside(drawn)] = classes.index(line)
        yield Scene(image, mask, shown)


def inside(drawn: Image.Image) -> NDArray[np.bool_]:
    """The pixels of a drawing that are more drawing than paper."""
    return np.asarray(drawn.getchannel("A")) >= 128


def captions(shown: Sequence[str], draw: random.Random) -> list[str]:
    """CAPTIONS captions of a scene, each naming all that is shown, in any order: by class names, by
    any synonyms.
    """

    def say(words: list[str]) -> str:
        draw.shuffle(words)
        return f"{draw.choice(KINDS)} of {', '.join(words[:-1])} and {words[-1]}"

    names = [split_label(line) for line in shown]
    return [say([name for name, *_ in names]), say([draw.choice(of) for of in names])]


def _write(folder: Path, scenes: Iterator[Scene], seed: int) -> None:
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


def _write_gallery(folder: Path) -> None:
    with (folder / "gallery.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "style", "caption"])
        for style in (FINE_TUNED, *SCENE_SHIFTS):
            with (folder / f"test-{style}" / "captions.csv").open(
                encoding="utf-8", newline=""
            ) as captions:
                rows = list(csv.DictReader(captions))[::CAPTIONS]
            table.writerows([f"test-{style}/{row['image']}", style, row["caption"]] for row in rows)
