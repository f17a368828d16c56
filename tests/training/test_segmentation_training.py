"""Segmentation training: from images with masks to an adapter file, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radapter_serve.adapter import load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.masks import Masked, list_segments, load_masked
from radapter_serve.data.runs import validation_data
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, train
from tests.helpers.short_run import short_run

COLOURS = {1: (220, 30, 30), 2: (20, 200, 40), 3: (30, 40, 220)}
NAMES = ["red", "green, lime", "blue"]
IMAGES = 8


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """DIR of 8 images of 48 by 40 pixels: noise, and on it a rectangle of each class in its
    colour.
    """
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "scenes" / name).mkdir(parents=True)
    for index in range(IMAGES):
        pixels = generator.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        for id_, colour in COLOURS.items():
            top = generator.integers(0, 20)
            left = 16 * (id_ - 1)
            height = generator.integers(10, 20)
            width = generator.integers(10, 14)
            pixels[top : top + height, left : left + width] = colour
            mask[top : top + height, left : left + width] = id_
        mask[39, 47] = 200  # no class
        Image.fromarray(pixels).save(tmp_path / "scenes" / "images" / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / "scenes" / "masks" / f"{index}.png")
    names = {0: "void", **dict(enumerate(NAMES, 1))}
    (tmp_path / "scenes" / "classes.json").write_text(json.dumps(names))
    return tmp_path / "scenes"


@pytest.fixture
def recipe(tiny_clip_dir: str, scenes: Path, tmp_path: Path) -> Recipe:
    return short_run(
        tiny_clip_dir,
        tmp_path,
        task="segmentation",
        data=f"masks:{scenes}",
        val_data=f"masks:{scenes}",
        mask_min_area=50,
        mask_padding=0.1,
        alpha=0.4,
        steps=30,
        dense="naclip",
        save_every=500,
    )


def test_small_segments_are_left_out(scenes: Path) -> None:
    areas = [
        (np.asarray(Image.open(path)) == id_).sum()
        for path in (scenes / "masks").iterdir()
        for id_ in COLOURS
    ]
    large = list_segments(load_masked(DataSource(f"masks:{scenes}")), 150)
    assert len(large.rows) == sum(area >= 150 for area in areas) < 3 * IMAGES
    with pytest.raises(RAdapterError, match=f"the largest {max(areas)}; lower --mask-min-area"):
        list_segments(load_masked(DataSource(f"masks:{scenes}")), 1024)


def test_broken_images_are_refused_or_left_out(scenes: Path) -> None:
    (scenes / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(RAdapterError, match="3.png can't be read"):
        list_segments(load_masked(DataSource(f"masks:{scenes}")), 1)
    (scenes / "masks" / "5.png").write_bytes(b"no mask")
    with pytest.raises(RAdapterError, match=r"2 of \d+ images .*:\n.*3.png.*\n.*5.png"):
        list_segments(load_masked(DataSource(f"masks:{scenes}")), 1)
    shutil.copy(scenes / "masks" / "4.png", scenes / "masks" / "5.png")
    broken: list[str] = []
    data = list_segments(load_masked(DataSource(f"masks:{scenes}")), 1, broken)
    assert len(data.rows) == 3 * (IMAGES - 1) and len(broken) == 1


def test_a_run_learns_and_its_file_says_how_to_crop(recipe: Recipe, scenes: Path) -> None:
    for number, kept in ((3, 0), (4, 200)):  # the second breaks only when it is decoded
        path = scenes / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:kept])
    run = train(dataclasses.replace(recipe, on_broken="skip"))
    metadata = load_adapter(run).metadata
    crop = metadata.source.mask_crop(load_base(recipe.architecture).preprocess["mean"])
    assert crop == MaskCrop(0.1, True, (122, 117, 105))  # the mean of this base, not CLIP's
    assert metadata.task == "segmentation" and metadata.recipe["dense"] == "naclip"
    assert metadata.metrics["acc1@alpha=1"] == 1  # three plain colours
    names = (run.folder / "broken.txt").read_text().splitlines()
    assert len(names) == 2 and "3.png" in names[0] and "4.png" in names[1]


def test_validation_masks_have_the_classes_of_the_run(
    recipe: Recipe, scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes, tmp_path / "val")
    other = dataclasses.replace(recipe, val_data=f"masks:{tmp_path}/val")
    for names, message in (
        (["red", "green, lime", "sky"], "has the class 'sky', which the run has not .1 of 3."),
        (["red", "green, lime"], "the run has the class 'blue', which masks:.*--classes FILE"),
        (["blue", "green, lime", "red"], None),
    ):
        classes = json.dumps(dict(enumerate(names, 1)))
        (tmp_path / "val" / "classes.json").write_text(classes)
        if message is None:
            held = validation_data(other, NAMES)
            assert isinstance(held, Masked) and held.classes == names
        else:
            with pytest.raises(RAdapterError, match=message):
                validation_data(other, NAMES)
