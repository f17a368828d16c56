"""Segmentation training: from images with masks to an adapter file, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from radapter_serve.adapter import Adapter, Metadata, attach_adapter, load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, zero_shot_classifier
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.masks import Masked, list_segments, load_masked
from radapter_serve.data.runs import run_data
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import SegmentationSet
from radapter_serve.evaluation.run import open_set, own_validation
from radapter_serve.training import Recipe, train
from tests.helpers.short_run import short_run

COLOURS = {1: (220, 30, 30), 2: (20, 200, 40), 3: (30, 40, 220)}
NAMES = ["red", "green, lime", "blue"]
IMAGES = 8
BROKEN = {3: 0, 4: 200}  # bytes that are kept; the second breaks only when it is decoded


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


def accuracy(recipe: Recipe, adapter: Adapter, scenes: Path, alpha: float) -> float:
    """From the files: crops made here, torchvision's own steps, one segment after another."""
    base = load_base(recipe.architecture)
    crop = recipe.mask_crop(base.preprocess["mean"])
    attach_adapter(base.model, adapter, alpha)
    prepare = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(base.preprocess["mean"], base.preprocess["std"]),
        ]
    )
    classifier = zero_shot_classifier(base.model, base.tokenizer, NAMES, ["a photo of a {}."])
    hits = []
    for number in set(range(IMAGES)) - set(BROKEN):
        image = Image.open(scenes / "images" / f"{number}.png")
        ids = np.asarray(Image.open(scenes / "masks" / f"{number}.png"))
        for id_ in COLOURS:
            with torch.no_grad():
                embed = encode_image(base.model, prepare(crop(image, ids == id_))[None])
            hits.append(int((embed @ classifier.T).argmax()) == id_ - 1)
    return float(np.mean(hits))


def test_a_run_learns_and_its_file_says_how_to_crop(recipe: Recipe, scenes: Path) -> None:
    for number, kept in BROKEN.items():
        path = scenes / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:kept])
    run = train(dataclasses.replace(recipe, on_broken="skip"))
    adapter = load_adapter(run)
    metadata = adapter.metadata
    crop = metadata.source.mask_crop(load_base(recipe.architecture).preprocess["mean"])
    assert crop == MaskCrop(0.1, True, (122, 117, 105))  # the mean of this base, not CLIP's
    assert metadata.task == "segmentation" and metadata.recipe["dense"] == "naclip"
    expected = {
        f"acc1@alpha={alpha:g}": pytest.approx(accuracy(recipe, adapter, scenes, alpha), abs=1e-4)
        for alpha in (0.4, 1.0)
    }
    assert metadata.metrics == expected
    assert metadata.metrics["acc1@alpha=1"] == 1  # three plain colours
    names = (run.folder / "broken.txt").read_text().splitlines()
    assert len(names) == 2 and "3.png" in names[0] and "4.png" in names[1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["red", "green, lime", "sky"], "has the class 'sky', which the run has not (1 of 3)"),
        (["red", "green, lime"], "the run has the class 'blue', which masks:"),
        (["blue", "green, lime", "red"], None),
    ],
)
def test_validation_masks_have_the_classes_of_the_run(
    recipe: Recipe, scenes: Path, tmp_path: Path, names: list[str], message: str | None
) -> None:
    shutil.copytree(scenes, tmp_path / "val")
    (tmp_path / "val" / "classes.json").write_text(json.dumps(dict(enumerate(names, 1))))
    other = dataclasses.replace(recipe, val_data=f"masks:{tmp_path}/val")
    fields = {"task": "segmentation", "recipe": other.to_dict(), "classes": NAMES}
    suite = own_validation(Metadata("x", "y", **fields))  # type: ignore[arg-type]
    if message is None:
        held = run_data(other)[1]
        evaluated = open_set(suite, suite.entries[0])
        assert isinstance(held, Masked) and isinstance(evaluated, SegmentationSet)
        assert held.classes == evaluated.classes == names
        return
    for open_data in (lambda: run_data(other), lambda: open_set(suite, suite.entries[0])):
        with pytest.raises(RAdapterError) as error:
            open_data()
        assert message in str(error.value) and "--classes FILE" in str(error.value)
