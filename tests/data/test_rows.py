"""Rows of images: from the splits that others published, and without labels."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from radapter_serve.contract.images import require_images
from radapter_serve.data.captions import load_captioned
from radapter_serve.data.labelled import class_split, load_labelled
from radapter_serve.data.rows import open_rows
from radapter_serve.data.runs import validation_data
from radapter_serve.data.source import DataSource, RunSource
from radapter_serve.errors import RAdapterError
from radapter_serve.index.collection import open_collection
from radapter_serve.training.recipe import GROUPS, Recipe

NAMES = ["Annual Crop_Land", "Forest", "River", "Sea or Lake"]
NUMBERS = {"train": [2, 0, 1], "val": [1, 3], "test": [3, 2, 2]}
COOP = {
    split: [[f"{split}/{place}.jpg", number, NAMES[number]] for place, number in enumerate(of)]
    for split, of in NUMBERS.items()
}


def photo(name: str, split: str, *captions: str, folder: str | None = "val2014") -> dict[str, Any]:
    place = {} if folder is None else {"filepath": folder}
    sentences = [{"raw": text} for text in captions]
    return {**place, "filename": name, "split": split, "sentences": sentences}


KARPATHY = {
    "images": [
        photo("1.jpg", "train", "one", "uno", folder="train2014"),
        photo("2.jpg", "restval", "two"),
        photo("3.jpg", "test", "three", "drei", "tre"),
        photo("4.jpg", "train", "four", folder=None),
    ]
}


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_classes_have_the_numbers_of_the_file_in_every_split(tmp_path: Path) -> None:
    file = write(tmp_path / "split_zhou_Own.json", COOP)
    images = tmp_path / "2750"
    (images / "test").mkdir(parents=True)
    Image.new("RGB", (4, 4), (9, 0, 0)).save(images / "test" / "1.jpg")
    test = load_labelled(DataSource(f"coop:{file}@test", images=images), every_class=False)
    assert test.classes == ["Annual Crop Land", "Forest", "River", "Sea or Lake"]
    assert test.labels().tolist() == [3, 2, 2]
    image, label, prompt = test.pair(test.rows[1], random.Random(0))
    assert image.size == (4, 4) and label == 2 and prompt == "a photo of a River."
    novel = class_split(test, "novel")
    assert novel.classes == ["River", "Sea or Lake"] and novel.labels().tolist() == [1, 0, 0]
    both = load_labelled(DataSource(f"coop:{file}@train+val", images=images))
    assert both.labels().tolist() == NUMBERS["train"] + NUMBERS["val"]


def test_karpathys_train_and_restval_are_one_source(tmp_path: Path) -> None:
    file = write(tmp_path / "dataset_coco.json", KARPATHY)
    data = load_captioned(DataSource(f"karpathy:{file}@train+restval", images=tmp_path / "coco"))
    captions = {data.table[image.row]["image"]: image.captions for image in data.images}
    assert captions == {
        "train2014/1.jpg": ("one", "uno"), "val2014/2.jpg": ("two",), "4.jpg": ("four",)
    }  # fmt: skip
    assert len(data.rows) == 4
    held = validation_data(RunSource(task="retrieval", val_data=f"karpathy:{file}@test"))
    assert len(held.images) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("karpathy:{}", KARPATHY, "needs a split; it has restval, test, train; name one as in kar"),
        ("karpathy:{}@train+dev", KARPATHY, "has no images of the split 'dev'; it has restval, te"),
        ("karpathy:no{}@test", KARPATHY, "cannot read nos.json: No such file"),
        ("karpathy:{}@test", COOP, "s.json as a file of Karpathy's splits: KeyError: 'images'"),
        ("karpathy:{}@test", "{", "JSONDecodeError"),
        ("karpathy:{}@test", {"images": [photo("1.jpg", "test", 3)]}, "unexpected types in"),  # type: ignore[arg-type]
        ("karpathy:{}@test", {"images": []}, "it has no images at all"),
        ("coop:{}@test", {**COOP, "val": [["a", 4, "Sea or Lake"]]}, "and their names must differ"),
        ("coop:{}@test", {**COOP, "val": [["a", 5, "Desert"]]}, "numbered from 0 on"),
        ("coop:{}@test", {**COOP, "val": [["a", 0, "Desert"]]}, "0 is both 'Annual Crop_Land' and"),
        ("coop:{}@test", {**COOP, "val": [["a", True, "Desert"]]}, "unexpected types"),
        ("coop:{}@test", {**COOP, "val": [["a", 4]]}, "CoOp's splits: ValueError"),
    ],
)
def test_files_of_splits_that_can_not_be_used(
    spec: str, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.json", content)
    with pytest.raises(RAdapterError) as error:
        open_rows(spec.format("s.json"), {"image": "--image-column"})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_images_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match="not a folder; give --calibration a folder of images"):
        require_images(tmp_path / "none", "--calibration a folder of images")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(RAdapterError, match="holds no image; .*it has 1 .txt"):
        require_images(tmp_path, "a folder")
    (tmp_path / "b").mkdir()
    paths = [tmp_path / name for name in ("a.png", "c.png", "b/d.png")]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    assert require_images(tmp_path, "a folder").images == paths


def test_each_field_of_a_recipe_is_in_one_group() -> None:
    grouped = [name for _, fields in GROUPS.values() for name in fields.split()]
    assert sorted(grouped) == sorted(field.name for field in dataclasses.fields(Recipe))


def test_an_adapter_files_recipe_is_read_into_one() -> None:
    fields: dict[str, Any] = {"images": Path("photos"), "val_fraction": 0.2, "seed": 3}
    recipe = Recipe(data="csv:t.csv", task="retrieval", **fields)
    source = RunSource.from_json(recipe.to_dict(), "retrieval")
    assert source == RunSource("csv:t.csv", "retrieval", **fields)
    # A field that a later version adds is ignored; one that an earlier lacked has its default.
    assert RunSource.from_json({"colour": "red"}, "segmentation") == RunSource(task="segmentation")
    assert RunSource.from_json({"task": "retrieval"}, "segmentation").task == "segmentation"
    for name, value in (("data", 3), ("val_fraction", 1), ("seed", True), ("images", 3)):
        with pytest.raises(ValidationError, match=name):
            RunSource.from_json({name: value}, "classification")


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress], ids=lambda pack: pack.__module__
)
@pytest.mark.parametrize("name", ["photos.csv.gz", "photos.csv", "*.csv"])
def test_a_compressed_table_is_refused_with_what_unpacks_it(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str
) -> None:
    """It may unpack to any size, whatever its name."""
    (tmp_path / name.replace("*", "any")).write_bytes(pack(b"image,label\n1.png,cat\n"))
    with pytest.raises(RAdapterError, match=r"is compressed, .*: gunzip -k \S+/\w+\.csv"):
        open_rows(f"csv:{tmp_path}/{name}", {})
    if "*" not in name:
        with pytest.raises(RAdapterError, match="is compressed, .* unpack it first"):
            open_collection(f"csv:{tmp_path}/{name}")
