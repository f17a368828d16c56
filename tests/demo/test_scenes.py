"""The demo's scenes: masks are the drawings' alpha, captions say what is shown, test scenes show
unseen drawings.
"""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from radapter_serve.contract.labels import split_label
from radapter_serve.data.masks import load_masked
from radapter_serve.demo import data
from radapter_serve.demo import data as scenes

FEW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> scenes.SceneData:
    place = tmp_path_factory.mktemp("demo") / "scenes"
    return scenes.prepare_scenes(place, train=FEW, test=FEW, quiet=True)


def test_a_mask_is_where_the_drawings_cover_the_paper() -> None:
    paper = len(scenes.scene_classes())
    both = np.zeros(3)  # pixels that are painted, inside, and both
    for scene in scenes.compose("test", "emoji-noto", 3 * FEW, 0):
        background = Image.new("RGB", scene.image.size, scene.image.getpixel((0, 0)))
        painted = np.asarray(ImageChops.difference(scene.image, background)).max(axis=2) > 0
        inside = scene.mask != paper
        both += [painted.sum(), inside.sum(), (painted & inside).sum()]
        lines = [scenes.scene_classes()[number] for number in np.unique(scene.mask[inside])]
        assert lines == sorted(scene.shown)
    assert both[2] > 0.9 * both[1]
    assert both[2] > 0.8 * both[0]  # half transparent edges are painted and not inside


def test_a_mask_equals_the_alpha_of_its_drawing() -> None:
    alpha = (
        Image.radial_gradient("L")
        .point(lambda value: 255 - value)
        .resize((scenes.CELL, scenes.CELL))
    )
    drawn = Image.merge("RGBA", [alpha, alpha, alpha, alpha])
    fills_its_cell = (scenes.CELL, scenes.CELL + 1)
    paper = len(scenes.scene_classes())
    expected = np.asarray(alpha) >= 128
    (scene,) = scenes.compose(
        "test", "colour", 1, 0, sides=fills_its_cell, draw_svg=lambda svg: drawn
    )
    cells = scene.mask.reshape(scenes.CELLS, scenes.CELL, scenes.CELLS, scenes.CELL).swapaxes(1, 2)
    full = [cell for cell in cells.reshape(-1, scenes.CELL, scenes.CELL) if (cell != paper).any()]
    assert len(full) == len(scene.shown)
    for cell in full:
        np.testing.assert_array_equal(cell != paper, expected)


def test_scenes_show_drawings_of_their_own_place() -> None:
    shown: list[str] = []
    blank = Image.new("RGBA", (scenes.CELL, scenes.CELL))

    def note(svg: str) -> Image.Image:
        shown.append(svg)
        return blank

    for split, style, place in (("train", "colour", "train"), ("test", "filled", "shifts/filled")):
        shown.clear()
        assert list(scenes.compose(split, style, 10, 0, draw_svg=note))  # type: ignore[arg-type]
        known = {svg for of in data.drawings_of(place).values() for svg in of}
        assert shown and set(shown) <= known


def test_styles_show_the_same_scenes() -> None:
    colour, noto = (
        list(scenes.compose("test", style, FEW, 1)) for style in ("colour", "emoji-noto")
    )
    for first, second in zip(colour, noto, strict=True):
        assert first.shown == second.shown
        assert first.image.tobytes() != second.image.tobytes()
        assert first.image.getpixel((0, 0)) == second.image.getpixel((0, 0))


def test_the_folders_are_data_of_masks_and_of_captions(
    folder: scenes.SceneData, tmp_path: Path
) -> None:
    with_paper = tmp_path / "classes.txt"
    with_paper.write_text("\n".join([*scenes.scene_classes(), "paper"]), encoding="utf-8")
    made = [(folder.train, scenes.compose("train", "colour", FEW, 0))]
    made += [(path, scenes.compose("test", style, FEW, 0)) for style, path in folder.test.items()]
    for place, drawn in made:
        composed = list(drawn)
        closed, opened = (
            load_masked(f"masks:{place}", classes=c) for c in (folder.classes, with_paper)
        )
        assert closed.classes == list(scenes.scene_classes()) and opened.classes == [
            *closed.classes,
            "paper",
        ]
        for scene, image, whole in zip(composed, closed.images, opened.images, strict=True):
            assert Image.open(image.path).tobytes() == scene.image.tobytes()
            np.testing.assert_array_equal(whole.mask(), scene.mask)
            inside = scene.mask < len(closed.classes)
            np.testing.assert_array_equal(image.mask() >= 0, inside)  # the paper is ignored
            assert len(image.segments()) == len(scene.shown)
        with (place / "captions.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == FEW * scenes.CAPTIONS and all(
            (place / row["image"]).is_file() for row in rows
        )
        for scene, row in zip(composed, rows[:: scenes.CAPTIONS], strict=True):
            assert all(split_label(line)[0] in row["caption"] for line in scene.shown)
    with folder.gallery.open(encoding="utf-8", newline="") as file:
        gallery = list(csv.DictReader(file))
    assert len(gallery) == FEW * len(folder.test)
    assert all((folder.gallery.parent / row["image"]).is_file() for row in gallery)


def test_captions_name_all_that_is_shown() -> None:
    shown = ["home, house", "key", "search, magnifying glass, magnifier"]
    seen = set()
    for seed in range(20):
        names, words = (
            re.split(", | and ", caption.partition(" of ")[2])
            for caption in scenes.captions(shown, random.Random(seed))
        )
        assert sorted(names) == ["home", "key", "search"] and len(words) == 3
        assert all(any(word in line.split(", ") for word in words) for line in shown)
        seen |= set(words)
    assert seen == {word for line in shown for word in line.split(", ")}


def test_a_finished_folder_is_taken_as_it_is(folder: scenes.SceneData) -> None:
    image = next((folder.train / "images").iterdir())
    changed = image.stat().st_mtime_ns
    assert scenes.prepare_scenes(folder.train.parent, quiet=True) == folder
    assert image.stat().st_mtime_ns == changed
