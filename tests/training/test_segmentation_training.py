"""Segmentation training: from images with masks to an adapter file, on a tiny model."""

from __future__ import annotations

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
from tests.training.test_wiring import CLASSES, masked

IMAGES = 8


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Images of 44 by 36 pixels with a segment of each of three classes."""
    masked(tmp_path / "scenes", IMAGES, padding=0, fill=(0, 0, 0))
    return tmp_path / "scenes"


def test_small_segments_are_left_out(scenes: Path) -> None:
    areas = [
        (np.asarray(Image.open(path)) == number).sum()
        for path in (scenes / "masks").iterdir()
        for number in range(len(CLASSES))
    ]
    large = list_segments(load_masked(DataSource(f"masks:{scenes}")), 150)
    assert len(large.rows) == sum(area >= 150 for area in areas) < 3 * IMAGES
    with pytest.raises(RAdapterError, match=f"the largest {max(areas)}; lower --mask-min-area"):
        list_segments(load_masked(DataSource(f"masks:{scenes}")), 1024)


def test_broken_images_are_refused_or_left_out(
    tiny_clip_dir: str, scenes: Path, tmp_path: Path
) -> None:
    data = f"masks:{scenes}"
    (scenes / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(RAdapterError, match="3.png can't be read"):
        list_segments(load_masked(DataSource(data)), 1)
    (scenes / "masks" / "5.png").write_bytes(b"no mask")
    with pytest.raises(RAdapterError, match=r"2 of \d+ images .*:\n.*3.png.*\n.*5.png"):
        list_segments(load_masked(DataSource(data)), 1)
    shutil.copy(scenes / "masks" / "4.png", scenes / "masks" / "5.png")
    # One more, which breaks only when it is decoded.
    path = scenes / "images" / "4.png"
    path.write_bytes(path.read_bytes()[:200])
    fields = {"mask_min_area": 50, "mask_padding": 0.1, "dense": "naclip", "on_broken": "skip"}
    recipe = short_run(
        tiny_clip_dir, tmp_path, task="segmentation", data=data, val_data=data, **fields
    )
    run = train(recipe)
    names = (run.folder / "broken.txt").read_text().splitlines()
    assert len(names) == 2 and "3.png" in names[0] and "4.png" in names[1]
    # The file says how to crop: around is the mean of this base, not CLIP's.
    metadata = load_adapter(run).metadata
    crop = metadata.source.mask_crop(load_base(recipe.architecture).preprocess["mean"])
    assert crop == MaskCrop(0.1, True, (122, 117, 105))
    assert metadata.task == "segmentation" and metadata.recipe["dense"] == "naclip"
    assert metadata.metrics.keys() == {"acc1@alpha=0.5", "acc1@alpha=1"}


def test_validation_masks_have_the_classes_of_the_run(scenes: Path) -> None:
    recipe = Recipe(task="segmentation", data="masks:other", val_data=f"masks:{scenes}")
    for names, message in (
        (["bird", "fish", "sky"], "has the class 'sky', which the run has not .1 of 3."),
        (["bird", "fish"], "the run has the class 'snake', which masks:.*--classes FILE"),
        (["snake", "fish", "bird"], None),
    ):
        (scenes / "classes.txt").write_text("\n".join(names))
        if message is None:
            validation = validation_data(recipe, CLASSES)
            assert isinstance(validation, Masked) and validation.classes == names
        else:
            with pytest.raises(RAdapterError, match=message):
                validation_data(recipe, CLASSES)
