"""Reading data sets: the same from every reader, their order, held-out shares, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_tensor

from radapter_serve.adapter import Metadata
from radapter_serve.clip.base import load_base
from radapter_serve.data.captions import Captioned, load_captioned
from radapter_serve.data.labelled import load_labelled
from radapter_serve.data.masks import Masked
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.run import open_set, own_validation
from radapter_serve.training import Recipe
from radapter_serve.training.batches import Examples, endless
from radapter_serve.training.data import open_run
from radapter_serve.training.recipe import load_recipe
from radapter_serve.training.setup import augmentation


def pixels(data: Any) -> dict[bytes, str]:
    return {
        np.asarray(data.image(row)).tobytes(): data.classes[data.labels_of(row)[0]]
        for row in data.rows
    }


def transform(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float() + torch.rand(1)  # as random as an augmentation


def opened(recipe: Recipe, **changes: Any) -> Any:
    """The training and the validation data of a recipe."""
    recipe = dataclasses.replace(recipe, **changes)
    return open_run(recipe, images=False).ready(recipe, None)  # type: ignore[arg-type]


def test_every_reader_gives_the_same_images_and_labels(images: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))
    labels = [file.parent.name for file in files]
    expected = {np.asarray(Image.open(file)).tobytes(): file.parent.name for file in files}
    names = [file.relative_to(tmp_path) for file in files]
    pd.DataFrame({"image": names, "label": labels}).to_csv(tmp_path / "table.csv", index=False)
    stored = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pd.DataFrame({"image": stored, "label": labels}).to_parquet(tmp_path / "table.parquet")
    classes = tmp_path / "classes.txt"
    classes.write_text("blue\ngreen, lime\nred\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for index, file in enumerate(files):
            (tmp_path / "number").write_text(str(["blue", "green", "red"].index(labels[index])))
            tar.add(file, f"{index:04d}.png")
            tar.add(tmp_path / "number", f"{index:04d}.cls")
    for spec in (
        f"imagefolder:{images}",
        f"imagefolder:{images}@train",
        f"csv:{tmp_path}/table.csv",
        f"parquet:{tmp_path}/table.parquet",
    ):
        assert pixels(load_labelled(DataSource(spec))) == expected
    named = {key: {"green": "green, lime"}.get(name, name) for key, name in expected.items()}
    assert pixels(load_labelled(DataSource(f"csv:{tmp_path}/table.csv", classes=classes))) == named
    web: dict[str, Any] = {"image_column": "png", "label_column": "cls", "classes": classes}
    assert pixels(load_labelled(DataSource(f"webdataset:{tmp_path}/shard.tar", **web))) == named


def items(data: Any, count: int, **options: Any) -> list[Any]:
    """Labels, texts and the sum of the pixels of the next batches of four."""
    data.templates = ["a {}", "the {}"]
    examples = Examples(data, transform, options.pop("seed", 0))
    source = endless(examples, 4, **{"workers": 0} | options)
    return [
        (b["labels"].tolist(), b["texts"], b["pixels"].sum().item())
        for _, b in islice(source, count)
    ]


def test_order_depends_on_seed_and_epoch_alone(images: Path) -> None:
    data = load_labelled(DataSource(f"imagefolder:{images}"))
    torch.manual_seed(1)
    first = items(data, 12)  # two epochs
    torch.manual_seed(2)
    assert items(data, 12, workers=2) == first
    assert items(data, 5, position=(0, 2)) == first[2:7]
    assert items(data, 6, position=(1, 0)) == items(data, 6, position=(0, 6)) == first[6:]
    for other in (first[6:], items(data, 6, seed=1)):  # not only augmented otherwise
        assert [labels for labels, *_ in other] != [labels for labels, *_ in first[:6]]


def test_the_workers_of_a_run_are_started_once(images: Path) -> None:
    data = load_labelled(DataSource(f"imagefolder:{images}"))
    examples = Examples(data, lambda _: torch.tensor([float(os.getpid())]), 0)
    batches = [batch for _, batch in islice(endless(examples, 4, workers=2), 18)]  # three epochs
    assert len({process for batch in batches for process in batch["pixels"].ravel().tolist()}) == 2


@pytest.mark.parametrize("world", [1, 3])
def test_processes_take_equal_shares_of_images_that_they_cannot_divide(
    images: Path, world: int
) -> None:
    """23 images: a process with a batch more than another would wait for it for ever."""
    (images / "red" / "7.png").unlink()
    examples = Examples(load_labelled(DataSource(f"imagefolder:{images}")), transform, 0)
    drawn_images: list[bytes] = []
    for rank in range(world):
        source = endless(examples, 4, rank=rank, world=world, workers=0)
        for (epoch, _), batch in source:
            if epoch:
                break
            drawn_images += [image.numpy().tobytes() for image in batch["pixels"]]
        assert len(drawn_images) == (rank + 1) * (23 // world // 4) * 4
    assert len(set(drawn_images)) == len(drawn_images)
    with pytest.raises(RAdapterError, match="fewer images that can be read than a batch of 24"):
        next(endless(examples, 24, workers=0))


def test_an_image_that_breaks_after_it_was_checked(images: Path) -> None:
    data = load_labelled(DataSource(f"imagefolder:{images}"))
    (images / "red" / "3.png").write_bytes(b"\x89PNG not really")
    (images / "red" / "4.png").unlink()
    with pytest.raises(RAdapterError, match=r"red/[34]\.png can't be read.*--on-broken skip"):
        list(islice(endless(Examples(data, transform, 0), 4, workers=0), 6))
    skipping = Examples(data, transform, 0, refuse=False)
    batches = [batch for _, batch in islice(endless(skipping, 4, workers=0), 6)]
    assert all(len(batch["labels"]) == 4 for batch in batches)
    names = {name.split(" can't")[0][-5:] for batch in batches for name in batch["broken"]}
    assert names == {"3.png", "4.png"}


def test_data_that_cannot_be_read(images: Path, tmp_path: Path) -> None:
    (images / "yellow").mkdir()
    with pytest.raises(RAdapterError, match="1 class folders of .* hold no image: 'yellow'; add"):
        load_labelled(DataSource(f"imagefolder:{images}"))
    csv = tmp_path / "t.csv"
    csv.write_text("image,label\na.png,cat\nb.png,cat\n")
    with pytest.raises(RAdapterError, match="has the one class 'cat'"):
        opened(Recipe(data=f"csv:{csv}"))
    for content, message in (
        (b"", "No columns to parse"),
        (b"image,label\n", "it holds no rows"),
        (b"image,label\na.png,gr\xfcn\n", "'utf-8' codec can't decode.*save the file as UTF-8"),
        (b"picture,label\na.png,blue\n", "no column 'image'; its columns: picture, label; see --i"),
        (None, "could not read"),
    ):
        csv.unlink()
        if content is not None:
            csv.write_bytes(content)
        with pytest.raises(RAdapterError, match=message):
            load_labelled(DataSource(f"csv:{csv}"))
    pd.DataFrame({"image": [], "label": []}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(RAdapterError, match="it holds no rows"):
        load_labelled(DataSource(f"parquet:{tmp_path}/t.parquet"))


def test_a_share_of_each_class_is_held_out_for_validation(images: Path) -> None:
    for number in range(7):
        (images / "red" / f"{number}.png").unlink()  # one is left, which is trained with

    def names(data: Any) -> set[str]:
        return {data.name(row) for row in data.rows}

    recipe = Recipe(data=f"imagefolder:{images}", val_fraction=0.25, shots=2)
    data, val = opened(recipe)
    assert not names(data) & names(val)
    assert np.bincount(data.labels()).tolist() == [2, 2, 1]
    assert np.bincount(val.labels()).tolist() == [2, 2]
    assert names(opened(recipe)[1]) == names(val) != names(opened(recipe, seed=1)[1])
    all_images, _ = opened(recipe, shots=None)
    assert np.bincount(all_images.labels()).tolist() == [6, 6, 1]
    draws = [names(opened(recipe, val_fraction=0.0, seed=seed)[0]) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for folder in images.iterdir():
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    with pytest.raises(RAdapterError, match="no class has two images; .* --val-fraction 0$"):
        opened(recipe)


def test_held_out_captions_and_segments_keep_an_image_together(tmp_path: Path) -> None:
    rows = [(f"{number}.png", f"{number} {word}") for number in range(5) for word in ("one", "two")]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "t.csv", index=False)
    recipe = Recipe(task="retrieval", data=f"csv:{tmp_path}/t.csv", val_fraction=0.4)
    data, val = opened(recipe, captions_per_image=2)
    assert (len(data.images), len(val.images), val.captions_per_image) == (3, 2, 1)
    captions = [text for image in (*data.images, *val.images) for text in image.captions]
    assert sorted(captions) == sorted(text for _, text in rows)
    masked: Any = Masked(list("abcde"), ["x", "y"])  # type: ignore[arg-type]
    rest, validation = masked.held_out(0.4, 0)
    assert sorted([*rest.images, *validation.images]) == masked.images
    assert (len(rest.images), len(validation.images)) == (3, 2)


def validation_set(recipe: Recipe, classes: list[str] | None) -> Any:
    """The run's own validation data, as evaluation opens it."""
    fields = {"task": recipe.task, "recipe": recipe.to_dict(), "classes": classes}
    suite = own_validation(Metadata("ViT-B-32", "sha256:0", **fields))  # type: ignore[arg-type]
    return open_set(suite, suite.entries[0])


@pytest.mark.parametrize("missing", ["imagefolder:{}@val", "csv:{}.csv", "classes"])
def test_a_runs_data_that_is_missing_says_in_which_folder_it_was_looked_for(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = f"looked for in {tmp_path}: start there, or name other data with --validation"
    for place, where in (("elsewhere", relative), (str(tmp_path / "elsewhere"), "")):
        if missing == "classes":
            recipe = Recipe(data="", val_data=f"imagefolder:{images}", classes=Path(place))
        else:
            recipe = Recipe(data="", val_data=missing.format(place))
        with pytest.raises(RAdapterError, match="elsewhere") as caught:
            validation_set(recipe, None)
        assert ("looked for" in str(caught.value)) == bool(where) and where in str(caught.value)
    with pytest.raises(RAdapterError, match=f"places in {tmp_path}, so start it where it began"):
        opened(Recipe(data="imagefolder:elsewhere", resume=True))


def test_validation_data_is_evaluated_among_all_classes_of_the_run(
    images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "val", ignore=shutil.ignore_patterns("green"))
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "amber")
    recipe = Recipe(data=f"imagefolder:{images}", val_data=f"imagefolder:{tmp_path}/val")
    data, val = opened(recipe)
    assert val.classes == [*data.classes, "amber"] == ["blue", "green", "red", "amber"]
    labels = {
        (Path(val.name(row)).parent.name, val.classes[val.labels_of(row)[0]]) for row in val.rows
    }
    assert labels == {(name, name) for name in ("amber", "blue")}
    _, base = opened(recipe, class_split="base")
    assert base.classes == ["blue", "green"] and np.bincount(base.labels()).tolist() == [8]
    evaluated = validation_set(recipe, data.classes)
    assert evaluated.classes == val.classes
    assert evaluated.labels.tolist() == val.labels().tolist()


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_the_share_that_training_held_out_is_the_run_s_own_validation_data(
    task: Any, images: Path, tmp_path: Path
) -> None:
    rows = [(str(file), f"photo {file.stem}") for file in sorted(images.rglob("*.png"))]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "t.csv")
    data = f"csv:{tmp_path}/t.csv" if task == "retrieval" else f"imagefolder:{images}"
    recipe = Recipe(task=task, data=data, val_fraction=0.25, seed=3)
    _, val = opened(recipe)
    held_out = val.rows if task == "classification" else [val.table[of.row] for of in val.images]
    evaluated = validation_set(recipe, getattr(val, "classes", None))
    assert [of.name for of in evaluated.images] == [val.name(row) for row in held_out]
    assert len(evaluated) == 6


def test_names_of_splits_in_folders_of_images(images: Path) -> None:
    (images / "red").rename(images / "train")
    (images / "blue" / "0.png").rename(images / "blue" / "test-0.png")
    data = load_labelled(DataSource(f"imagefolder:{images}"))
    assert data.classes == ["blue", "green", "train"] and len(data.rows) == 24
    root = images.parent / "split"
    for split, names in (("train", ("blue", "green")), ("val", ("blue",))):
        for name in names:
            shutil.copytree(images / name, root / split / name)
    assert len(load_labelled(DataSource(f"imagefolder:{root}")).rows) == 16
    shutil.copytree(images / "green", root / "val" / "green")
    assert load_labelled(DataSource(f"imagefolder:{root}@val")).classes == ["blue", "green"]
    with pytest.raises(RAdapterError, match="no folder .*split/test"):
        load_labelled(DataSource(f"imagefolder:{root}@test"))


def captions_of(data: Captioned) -> dict[int, list[str]]:
    """Captions by the brightness of their image."""
    captions: dict[int, list[str]] = {}
    for row in data.images:
        image = data.image(data.table[row.row])
        captions[np.asarray(image)[0, 0, 0] // 60] = sorted(row.captions)
    return captions


def test_every_reader_gives_the_same_captions(tmp_path: Path) -> None:
    texts = [
        ["a dark square", "night"],
        ["a grey square", "fog", "overcast sky"],
        ["a bright square"],
    ]
    pairs = [(f"{value}.png", text) for value, of in enumerate(texts) for text in of]
    for value in range(3):
        Image.new("RGB", (8, 8), (60 * value,) * 3).save(tmp_path / f"{value}.png")
    rows = [pairs[index] for index in (0, 2, 1, 5, 3, 4)]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "rows.csv", index=False)
    lists = [{"image": f"{value}.png", "caption": of} for value, of in enumerate(texts)]
    (tmp_path / "lists.json").write_text("\n".join(map(json.dumps, lists)))
    stored = [  # the same bytes are the same image
        {"picture": {"bytes": (tmp_path / name).read_bytes(), "path": None}, "text": text}
        for name, text in pairs
    ]
    pd.DataFrame(stored).to_parquet(tmp_path / "stored.parquet")
    columns: Any = {"image_column": "picture", "caption_column": "text"}
    table = f"csv:{tmp_path}/rows.csv"
    for source in (
        DataSource(table),
        DataSource(f"json:{tmp_path}/lists.json"),
        DataSource(f"parquet:{tmp_path}/stored.parquet", **columns),
    ):
        assert captions_of(load_captioned(source)) == dict(enumerate(texts))
    with pytest.raises(RAdapterError, match="no column 'text'; its columns: .*; see --caption-c"):
        load_captioned(DataSource(table, caption_column="text"))
    with pytest.raises(RAdapterError, match="captions_per_image is 4 but no image of .* than 3"):
        load_captioned(DataSource(table), captions_per_image=4)


def test_images_of_every_mode_become_three_channels(tiny_clip_dir: str) -> None:
    base = load_base(tiny_clip_dir)
    mean, std = (torch.tensor(base.preprocess[name]) for name in ("mean", "std"))
    for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = Image.new("RGB", (60, 60), (200, 40, 90)).convert(mode, dither=Image.Dither.NONE)
        crop = augmentation(base, load_recipe("small"))(image)
        assert crop.shape == (3, base.image_size, base.image_size)
        expected = to_tensor(image.convert("RGB"))[:, 0, 0]
        torch.testing.assert_close(crop[:, 5, 5], (expected - mean) / std, rtol=0, atol=1e-5)
