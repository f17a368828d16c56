"""Segmentation training: from images with masks to an adapter file, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import transforms

from radapter_serve.adapter import Adapter, Metadata, attach_adapter, load_adapter
from radapter_serve.cli.train import main
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.data.masks import Masked, load_masked
from radapter_serve.data.rows import BrokenImage, decode_named
from radapter_serve.data.runs import run_data
from radapter_serve.data.segments import SegmentCrops, list_segments
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import zero_shot_classifier
from radapter_serve.evaluation.segmentation import SegmentationSet
from radapter_serve.evaluation.sets import open_set, own_validation
from radapter_serve.training import Recipe, train
from tests.helpers.short_run import short_run

COLOURS = {1: (220, 30, 30), 2: (20, 200, 40), 3: (30, 40, 220)}
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
    (tmp_path / "scenes" / "classes.json").write_text(
        json.dumps({0: "void", 1: "red", 2: "green, lime", 3: "blue"})
    )
    return tmp_path / "scenes"


def segments(scenes: Path, min_area: int = 1, broken: list[str] | None = None) -> SegmentCrops:
    data = list_segments(load_masked(f"masks:{scenes}"), min_area, broken)
    return replace(data, templates=["a {} thing"])


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


def test_rows_are_the_segments_and_pairs_their_crops(scenes: Path) -> None:
    data = segments(scenes)
    assert len(data.rows) == 3 * IMAGES and data.classes == ["red", "green, lime", "blue"]
    for index, row in enumerate(data.rows):
        image, label, text = data.pair(row, random.Random(0))
        assert label == index % 3 and text == f"a {('red', 'green', 'blue')[label]} thing"
        number = index // 3
        mask = np.asarray(Image.open(scenes / "masks" / f"{number}.png")) == label + 1
        source = Image.open(scenes / "images" / f"{number}.png")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(MaskCrop()(source, mask)))
        colours = {colour for _, colour in image.getcolors() or []}
        assert colours <= {COLOURS[label + 1], MaskCrop.fill}  # none of the noise


def test_small_segments_are_left_out(scenes: Path) -> None:
    areas = [
        (np.asarray(Image.open(path)) == id_).sum()
        for path in (scenes / "masks").iterdir()
        for id_ in COLOURS
    ]
    assert (
        len(segments(scenes, min_area=150).rows) == sum(area >= 150 for area in areas) < 3 * IMAGES
    )
    with pytest.raises(
        RAdapterError,
        match=f"no segment has 1024 pixels, the largest {max(areas)}; lower --mask-min",
    ):
        segments(scenes, min_area=1024)
    (scenes / "classes.json").write_text('{"9": "cat"}')
    with pytest.raises(RAdapterError, match="hold no pixel of a class that is named .cat"):
        segments(scenes)


def test_broken_images_are_refused_or_left_out(scenes: Path) -> None:
    (scenes / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(RAdapterError, match="3.png can't be read"):
        segments(scenes)
    (scenes / "masks" / "5.png").write_bytes(b"no mask")
    with pytest.raises(
        RAdapterError, match=r"2 of \d+ images can't be used with their masks:\n.*3.png.*\n.*5.png"
    ):
        segments(scenes, broken=None)
    shutil.copy(scenes / "masks" / "4.png", scenes / "masks" / "5.png")
    broken: list[str] = []
    data = segments(scenes, broken=broken)
    assert len(data.rows) == 3 * (IMAGES - 1) and len(broken) == 1
    path = scenes / "images" / "4.png"
    path.write_bytes(path.read_bytes()[:200])  # its header is whole
    with pytest.raises(BrokenImage, match="4.png can't be read: the image is broken"):
        data.image(data.rows[9])


def test_each_image_is_decoded_once_in_a_pass_in_order(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radapter_serve.data import segments as module

    data = segments(scenes)
    reads = Mock(wraps=decode_named)
    monkeypatch.setattr(module, "decode_named", reads)
    for row in data.rows:
        data.image(row)
    assert reads.call_count == IMAGES


def accuracy(
    recipe: Recipe, adapter: Adapter, scenes: Path, alpha: float, images: Iterable[int]
) -> float:
    """Per cent, from the files: crops made here, torchvision's own steps, one segment after
    another.
    """
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
    names = ["red", "green, lime", "blue"]
    classifier = zero_shot_classifier(base.model, base.tokenizer, names, ["a photo of a {}."])
    hits = []
    for number in images:
        image = Image.open(scenes / "images" / f"{number}.png")
        ids = np.asarray(Image.open(scenes / "masks" / f"{number}.png"))
        for id_ in COLOURS:
            with torch.no_grad():
                found = (
                    encode_image(base.model, prepare(crop(image, ids == id_))[None]) @ classifier.T
                )
            hits.append(int(found.argmax()) == id_ - 1)
    return 100 * float(np.mean(hits))


def test_a_run_learns_and_its_file_says_how_to_crop(recipe: Recipe, scenes: Path) -> None:
    adapter = load_adapter(train(recipe))
    metadata = adapter.metadata
    assert metadata.task == "segmentation" and metadata.alpha == 0.4
    base = load_base(recipe.architecture)
    crop = metadata.source.mask_crop(base.preprocess["mean"])
    assert crop == MaskCrop(0.1, True, (122, 117, 105))  # the mean of this base, not CLIP's
    assert metadata.recipe["dense"] == "naclip" and metadata.recipe["mask_min_area"] == 50
    assert set(metadata.metrics) == {"acc1@alpha=0.4", "acc1@alpha=1"}
    for alpha in (0.4, 1.0):
        expected = accuracy(recipe, adapter, scenes, alpha, range(IMAGES))
        assert metadata.metrics[f"acc1@alpha={alpha:g}"] == pytest.approx(expected / 100, abs=1e-4)
    assert metadata.metrics["acc1@alpha=1"] == 1  # three plain colours


def test_coco_annotations_train_as_label_maps_do(
    recipe: Recipe, scenes: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, steps=3, val_data=None)
    whole = load_adapter(train(recipe))
    images = []
    annotations = []
    (tmp_path / "panoptic").mkdir()
    for number in range(IMAGES):
        ids = np.asarray(Image.open(scenes / "masks" / f"{number}.png")).astype(np.int64)
        ids[ids == 200] = 0
        found = ids * 1000
        Image.fromarray(np.dstack([found % 256, found // 256, found * 0]).astype(np.uint8)).save(
            tmp_path / "panoptic" / f"{number}.png"
        )
        images.append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 40})
        info = [
            {"id": id_ * 1000, "category_id": id_, "area": int((ids == id_).sum())}
            for id_ in COLOURS
        ]
        annotations.append(
            {"image_id": number, "file_name": f"{number}.png", "segments_info": info}
        )
    categories = [
        {"id": id_, "name": name} for id_, name in enumerate(("red", "green, lime", "blue"), 1)
    ]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    coco = dataclasses.replace(
        recipe,
        data=f"coco:{tmp_path}/panoptic.json",
        images=scenes / "images",
        out=tmp_path / "coco",
    )
    for name, value in load_adapter(train(coco)).tensors.items():
        assert torch.equal(value, whole.tensors[name]), name


def test_a_run_leaves_out_and_names_broken_images(recipe: Recipe, scenes: Path) -> None:
    for number, keep in ((3, 0), (4, 200)):  # the second is found out only when it is decoded
        path = scenes / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:keep])
    out = train(dataclasses.replace(recipe, steps=4, on_broken="skip", workers=1)).folder
    named = (out / "broken.txt").read_text().splitlines()
    assert len(named) == 2 and "3.png" in named[0] and "4.png" in named[1]
    adapter = load_adapter(out)
    for alpha in (0.4, 1.0):  # of the images that are whole
        expected = accuracy(recipe, adapter, scenes, alpha, (0, 1, 2, 5, 6, 7))
        assert adapter.metadata.metrics[f"acc1@alpha={alpha:g}"] == pytest.approx(
            expected / 100, abs=1e-4
        )


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {1: "red", 2: "green, lime", 3: "sky"},
            "masks:{val} has the class 'sky', which the run has not (1 of 3)",
        ),
        (
            {1: "red", 2: "green, lime"},
            "the run has the class 'blue', which masks:{val} has not (1 of 3)",
        ),
        ({3: "red", 2: "green, lime", 1: "blue"}, None),
    ],
)
def test_validation_masks_have_the_classes_of_the_run(
    recipe: Recipe, scenes: Path, tmp_path: Path, classes: dict[int, str], message: str | None
) -> None:
    shutil.copytree(scenes, tmp_path / "val")
    (tmp_path / "val" / "classes.json").write_text(json.dumps(classes))
    other = dataclasses.replace(recipe, val_data=f"masks:{tmp_path}/val")
    suite = own_validation(
        Metadata(
            "x",
            "y",
            task="segmentation",
            recipe=other.to_dict(),
            classes=["red", "green, lime", "blue"],
        )
    )
    if message is None:
        held = run_data(other)[1]
        evaluated = open_set(suite, suite.entries[0])
        assert isinstance(held, Masked) and isinstance(evaluated, SegmentationSet)
        assert held.classes == evaluated.classes == list(classes.values())
        return
    for open_data in (lambda: run_data(other), lambda: open_set(suite, suite.entries[0])):
        with pytest.raises(RAdapterError) as error:
            open_data()
        assert str(error.value).startswith(
            message.format(val=tmp_path / "val")
        ) and "--classes FILE" in str(error.value)


def test_what_is_wrong_is_one_line(
    recipe: Recipe, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))

    def run(*arguments: str) -> str:
        assert main(["--recipe", str(path), "--out", str(tmp_path / "run"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("radapter-train: error: ") and error.count("\n") == 1
        return error

    assert "allowed: masks:DIR, coco:FILE.json" in run("--data", "imagefolder:photos")
    assert "mask_padding is -1.0; it should be greater than or equal to 0" in run(
        "--mask-padding", "-1"
    )
    assert "mask_min_area is 0; it should be greater than or equal to 1" in run(
        "--mask-min-area", "0"
    )
    assert "lower --mask-min-area" in run("--mask-min-area", "5000")
    assert "streaming is True, which task segmentation does not use" in run("--streaming")
    (scenes / "masks" / "5.png").unlink()
    assert "5.png has no mask" in run()
    assert not (tmp_path / "run").exists()
