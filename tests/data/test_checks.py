"""Faults of data are found at once, before a model is loaded, by rules that every part shares."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import open_clip
import pandas as pd
import pytest
from huggingface_hub import constants

from radapter_client._images import SUFFIXES as OF_THE_CLIENT
from radapter_serve.clip.base import load_base
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import (
    FORMATS,
    SUFFIXES,
    decode,
    list_images,
    require_images,
    verify,
)
from radapter_serve.contract.labels import split_label
from radapter_serve.data.labelled import load_labelled
from radapter_serve.data.runs import broken_images
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.index.collection import open_collection
from radapter_serve.sources import REPOSITORIES, check_weights, unreachable
from radapter_serve.training import Recipe, load_recipe
from radapter_serve.training.data import open_run
from radapter_serve.training.recipe import ready_recipes
from tests.helpers.small_release import png


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """8 JPEG files in each of three class folders, and what is no image to anything."""
    for name in ("cat", "dog", "fire_truck"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(8):
            (folder / f"{number}.jpg").write_bytes(png(kind="JPEG"))
        (folder / "notes.txt").write_text("none")
        (folder / ".hidden.jpg").write_bytes(b"")
    return tmp_path / "photos"


def problems(recipe: Recipe) -> str:
    with pytest.raises(RAdapterError) as caught:
        open_run(recipe)
    return str(caught.value)


def test_a_folder_is_listed_as_the_library_of_data_sets_lists_it(photos: Path) -> None:
    (photos / "cat" / "train_3.jpg").write_bytes(png(kind="JPEG"))
    theirs = datasets.load_dataset(
        "imagefolder", data_files={"train": [f"{photos}/**"]}, split="train"
    )
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    ours = load_labelled(DataSource(f"imagefolder:{photos}"))
    assert [row["image"] for row in ours.rows] == [row["image"]["path"] for row in theirs]
    assert ours.labels().tolist() == list(theirs["label"])
    assert ours.keys == theirs.features["label"].names
    assert ours.classes == ["cat", "dog", "fire truck"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_check_refuses_what_decoding_refuses(format: str) -> None:
    whole = png(0, 90, 70, format)
    verify(whole)
    for data in (whole[: int(0.9 * len(whole))], b""):
        whys = []
        for call in (decode, verify):
            with pytest.raises(TaskError) as error:
                call(data)
            whys.append((error.value.code, "truncated" in error.value.what))
        assert whys[0] == whys[1]


def test_other_formats_are_left_out_and_named_the_same_way_everywhere(photos: Path) -> None:
    (photos / "cat" / "other.gif").write_bytes(png(kind="GIF"))
    data = f"imagefolder:{photos}"
    labelled = load_labelled(DataSource(data))
    collection = open_collection(str(photos))
    assert len(labelled.rows) == len(collection.items) == 24
    assert labelled.left_out == collection.left_out == {".txt": 3, ".gif": 1}
    (note,) = open_run(Recipe(data=data)).notes
    assert "left out 3 .txt, 1 .gif; images are .jpg, .jpeg, .png, .webp" in note
    (photos / "cat" / "3.jpg").write_bytes(png(kind="GIF"))
    assert "cat/3.jpg can't be read: GIF files are not read; mend" in problems(Recipe(data=data))
    assert set(OF_THE_CLIENT) == set(SUFFIXES)


def test_one_report_names_all_that_is_wrong(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "cat", photos / "Fire Truck")
    files = sorted(photos.rglob("[0-9]*.jpg"))
    for file in files[:23]:
        file.write_bytes(b"")
    recipe = Recipe(
        data=f"imagefolder:{photos}",
        val_data="csv:nowhere.csv",
        classes=tmp_path / "none.txt",
        templates="none.txt",
        architecture="local-dir:nowhere",
    )
    report = problems(recipe)
    assert "has 6 problems:" in report
    for words in ("model folder", "class file", "none.txt", "nowhere.csv", "and 'fire_truck'"):
        assert words in report, words
    assert "23 of 32 images of imagefolder:" in report and "and 3 more" in report


def test_missing_files_of_a_table_and_broken_ones_of_a_sample(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(photos.rglob("[0-9]*.jpg"))
    pd.DataFrame({"image": files, "label": [file.parent.name for file in files]}).to_csv(
        tmp_path / "t.csv"
    )
    for number in (5, 7):
        files[number].unlink()
    for number in (4, 6):  # of which a sample of every fourth has the first
        files[number].write_bytes(b"<html>")
    data = load_labelled(DataSource(f"csv:{tmp_path}/t.csv"))
    for max_decoded, numbers in ((6, (4, 5, 7)), (24, (4, 5, 6, 7))):
        monkeypatch.setattr("radapter_serve.data.runs._MAX_DECODED", max_decoded)
        names = [line.split(" can't be read: ")[0] for line in broken_images(data)]
        assert names == [f"image {files[number]}" for number in numbers]
    recipe = Recipe(data=f"csv:{tmp_path}/t.csv", on_broken="skip")
    skipping = open_run(recipe)
    assert "4 of 24 images" in skipping.notes[0] and len(skipping.data.rows) == 24
    for file in files:
        file.unlink(missing_ok=True)
    assert "not one of 24 images" in problems(recipe)


def test_names_of_folders_are_taken_whole(photos: Path, tmp_path: Path) -> None:
    (photos / "cat").rename(photos / "Washington, D.C.")
    (tmp_path / "c.txt").write_text(
        "Washington, D.C.\ndog, hound\nfire_truck: fire engine, truck\n"
    )
    for classes, truck in ((None, "fire truck"), (tmp_path / "c.txt", "fire engine")):
        data = load_labelled(DataSource(f"imagefolder:{photos}", classes=classes))
        names = [split_label(line)[0] for line in data.classes]
        assert names == ["Washington, D.C.", "dog", truck]
        assert data.among(data.classes).labels().tolist() == data.labels().tolist()
    # A class without a folder keeps its synonyms.
    with (tmp_path / "c.txt").open("a") as file:
        file.write("wine, wine glass\n")
    data = load_labelled(
        DataSource(f"imagefolder:{photos}", classes=tmp_path / "c.txt"), every_class=False
    )
    assert split_label(data.classes[-1]) == ["wine", "wine glass"]


def test_folders_with_signs_links_and_loose_images(photos: Path) -> None:
    home = photos.rename(photos.parent / "photos@home")
    assert len(load_labelled(DataSource(f"imagefolder:{home}")).rows) == 24
    (home / "dog" / "above").symlink_to(home)  # which has no end
    (photos.parent / "more").mkdir()
    shutil.copy(home / "cat" / "0.jpg", photos.parent / "more")
    (home / "dog" / "more").symlink_to(photos.parent / "more")
    assert sum("more" in file.parts for file in list_images(home / "dog").images) == 1
    shutil.copy(home / "cat" / "0.jpg", home)
    with pytest.raises(RAdapterError, match="1 images of .* lie outside of the class folders"):
        load_labelled(DataSource(f"imagefolder:{home}"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Act as a machine that can't reach the hub, and has nothing in its cache."""

    class Unplugged:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", Unplugged)
    unreachable.cache_clear()
    yield
    unreachable.cache_clear()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("imagefolder:nowhere", "no folder nowhere for imagefolder:nowhere"),
        ("photo:nowhere", "there is no such folder; allowed: imagefolder:PATH"),
        ("nobody/nothing", "no folder nobody/nothing.* no data set .*hf download nobody/noth"),
    ],
)
def test_data_that_is_not_there_is_named_without_a_retry(
    data: str, words: str, offline: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(RAdapterError, match=words):
        load_labelled(DataSource(data))
    assert not caplog.records


def test_a_folder_with_a_wrong_letter_is_named_with_those_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    for name in ("photos", "runs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for data in ("foto", f"imagefolder:{tmp_path}/foto"):
        with pytest.raises(
            RAdapterError, match=r"no folder \S*foto.* such as \S*photos[;)]"
        ) as error:
            load_labelled(DataSource(data))
        assert "runs" not in str(error.value)


@pytest.mark.skipif(".heic" in SUFFIXES, reason="the extra heic is there")
def test_photos_of_a_phone_are_named_with_the_command_that_converts_them(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.HEIC").write_bytes(b"")
    with pytest.raises(RAdapterError, match=r"it has 2 \.heic.*\[heic\].*heif-convert"):
        load_labelled(DataSource(f"imagefolder:{tmp_path}"))
    with pytest.raises(RAdapterError, match=r"it has 2 \.heic.*\[heic\].*heif-convert"):
        require_images(tmp_path, "a folder")


def test_weights_that_are_not_there_say_how_to_bring_them(offline: None) -> None:
    advice = (
        "no route to host.*hf download laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K .*give"
        " it with --base local-dir:clip"
    )
    with pytest.raises(RAdapterError, match=advice):
        load_base("ViT-B-32", "datacomp_xl_s13b_b90k")
    assert not constants.HF_HUB_OFFLINE  # as it was
    with pytest.raises(RAdapterError, match=advice):
        check_weights("ViT-B-32", "datacomp_xl_s13b_b90k")


def test_the_bases_of_recipes_have_the_repositories_that_open_clip_names() -> None:
    recipes = [load_recipe(name) for name in ready_recipes()]
    bases = {(recipe.architecture, recipe.pretrained) for recipe in recipes}
    assert bases == set(REPOSITORIES)
    for (name, tag), repository in REPOSITORIES.items():
        assert open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/") == repository


@pytest.mark.parametrize("base", ["ViT-B-32:datacomp_xl_s13b_b90k", "hf-hub:somebody/clip"])
def test_a_base_that_is_nowhere_is_refused_before_torch_is_loaded(
    base: str, tmp_path: Path
) -> None:
    script = (
        "import sys; from radapter_serve.cli.train import main;"
        f" code = main(['--data', 'photos', '--base', {base!r}]);"
        " assert not {'torch', 'open_clip', 'datasets'} & set(sys.modules);"
        " sys.exit(code)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    refused = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in refused.stderr and "`hf download " in refused.stderr


def test_weights_in_the_cache_need_no_hub(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--vit_base_patch16_clip_224.openai" / "snapshots" / "1"
    with pytest.raises(RAdapterError, match="no route to host"):
        check_weights("ViT-B-16", "openai")
    folder.mkdir(parents=True)
    (folder / "open_clip_model.safetensors").touch()
    check_weights("ViT-B-16", "openai")
