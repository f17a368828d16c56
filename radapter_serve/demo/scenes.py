"""The demo's scenes: drawings of different classes on coloured paper, with their exact masks and with captions."""

from __future__ import annotations

import csv
import functools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from radapter_serve.demo.data import FINE_TUNED, Concept, Split, class_names, concepts, drawing, made_whole, render

CELL, CELLS = 80, 2  # a scene is a square of 2 x 2 cells, each with a drawing or none
SIDES = (60, 81)  # pixels of a drawing, from and below
TRAIN, TEST = 600, 100  # scenes
CAPTIONS = 3  # of each scene; the first names all that is shown
SCENE_SHIFTS = ("noto", "fluent")
SHORT_SIDE = 96  # pixels, of dense segmentation: a scene's drawings are as large as a window then
PAPERS = ("white", "#fdf6e3", "#eaf2fb", "#edf7ed", "#fbeaf0", "#f1f1f1")
KINDS = ("a drawing", "a picture", "an emoji")


@dataclass(frozen=True)
class Scene:
    """Drawings side by side.

    Attributes:
        image: RGB.
        mask: uint8 [H, W], the number of a pixel's class; one more than the last for the paper.
        shown: the drawings' concepts.
    """

    image: Image.Image
    mask: NDArray[np.uint8]
    shown: Sequence[Concept]


@dataclass(frozen=True)
class SceneData:
    """Folders with `images/`, `masks/` and `captions.csv`; a mask holds the line of a pixel's class in the class file.

    Attributes:
        train: drawings of the style that the demo fine-tunes on.
        test: by style, concepts that neither the base nor fine-tuning has seen; scene for scene the same in all styles.
        classes: class file; the paper is none of them.
        gallery: CSV of all test scenes: image, style, caption.
    """

    train: Path
    test: dict[str, Path]
    classes: Path
    gallery: Path


def prepare_scenes(folder: str | Path, *, seed: int = 0, quiet: bool = False) -> SceneData:
    """Compose the demo's scenes; a folder that is there already is taken as it is.

    Args:
        folder: is made, whole or not at all.
        seed: of what is shown where.
        quiet: no progress bar.

    Raises:
        RAdapterError: the drawings are not installed, or the folder can't be written.
    """
    folder = Path(folder)
    places: list[tuple[str, Split, str, int]] = [("train", "train", FINE_TUNED, TRAIN)]
    places += [(f"test-{style}", "test", style, TEST) for style in (FINE_TUNED, *SCENE_SHIFTS)]
    if not (folder / "classes.txt").is_file():
        with made_whole(folder, "scenes") as part:
            for place, split, style, count in track(places, "Composing the scenes", disable=quiet):
                _write(part / place, compose(split, style, count, seed), seed)
            _write_gallery(part)
            (part / "classes.txt").write_text("\n".join(class_names()) + "\n", encoding="utf-8")
    test = {style: folder / f"test-{style}" for style in (FINE_TUNED, *SCENE_SHIFTS)}
    return SceneData(folder / "train", test, folder / "classes.txt", folder / "gallery.csv")


def compose(split: Split, style: str, count: int, seed: int) -> Iterator[Scene]:
    """Scenes of two to four drawings, each of another class.

    Args:
        split: whose concepts are shown.
        style: they are drawn in; the same seed shows the same concepts at the same places in every style.
        count: of the scenes.
        seed: of what is shown where.
    """
    classes, draw = class_names(), random.Random(seed)
    by_class: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts():
        if concept.split == split and concept.class_name and all(drawing(concept, s) for s in _styles(split)):
            by_class[concept.class_name].append(concept)
    corners = [(x * CELL, y * CELL) for x in range(CELLS) for y in range(CELLS)]
    for _ in range(count):
        image = Image.new("RGB", (CELLS * CELL, CELLS * CELL), draw.choice(PAPERS))
        mask = np.full((image.height, image.width), len(classes), np.uint8)
        chosen = draw.sample(corners, draw.randint(2, len(corners)))
        shown = [draw.choice(by_class[name]) for name in draw.sample(classes, len(chosen))]
        for (left, top), concept in zip(chosen, shown, strict=True):
            side = draw.randrange(*SIDES)
            x, y = left + draw.randint(0, CELL - side), top + draw.randint(0, CELL - side)
            drawn = rendered(concept, style).resize((side, side), Image.Resampling.LANCZOS)
            image.paste(drawn, (x, y), drawn)
            mask[y : y + side, x : x + side][inside(drawn)] = classes.index(concept.class_name)
        yield Scene(image, mask, shown)


@functools.cache
def rendered(concept: Concept, style: str) -> Image.Image:
    """A concept in a style that has it, drawn once at a cell's size, as RGBA."""
    svg = drawing(concept, style)
    assert svg is not None, f"{concept.name} has no drawing in {style}"
    return render(svg, CELL)


def inside(drawn: Image.Image) -> NDArray[np.bool_]:
    """The pixels of a drawing that are more drawing than paper."""
    return np.asarray(drawn.getchannel("A")) >= 128


def captions(shown: Sequence[Concept], draw: random.Random) -> list[str]:
    """CAPTIONS captions of a scene, each naming all that is shown, in any order: by names, by classes, by keywords."""

    def say(words: list[str]) -> str:
        draw.shuffle(words)
        return f"{draw.choice(KINDS)} of {', '.join(words[:-1])} and {words[-1]}"

    keywords = [draw.choice(concept.tags or (concept.name,)) for concept in shown]
    return [say([c.name for c in shown]), say([c.class_name for c in shown]), say(keywords)]


def _styles(split: Split) -> tuple[str, ...]:
    return (FINE_TUNED,) if split == "train" else (FINE_TUNED, *SCENE_SHIFTS)


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
            with (folder / f"test-{style}" / "captions.csv").open(encoding="utf-8", newline="") as captions:
                rows = list(csv.DictReader(captions))[::CAPTIONS]
            table.writerows([f"test-{style}/{row['image']}", style, row["caption"]] for row in rows)
