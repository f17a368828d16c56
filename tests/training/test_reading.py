"""Reading data sets: the same images by every road, and clear words for what can't be used."""

from __future__ import annotations

import dataclasses
import io
import random
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from radapter_serve.adapter import Metadata
from radapter_serve.clip.prompts import templates_of
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import Labelled, load_labelled
from radapter_serve.data.masks import Masked
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import ClassificationSet
from radapter_serve.evaluation.sets import open_set, own_validation
from radapter_serve.training import Recipe
from radapter_serve.training.batches import Examples, batches
from radapter_serve.training.tasks import open_data


def pixels(data: Any) -> dict[bytes, str]:
    return {
        np.asarray(data.image(row)).tobytes(): data.classes[data.label(row)] for row in data.rows
    }


def transform(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float() + torch.rand(1)  # as random as an augmentation


def test_every_reader_gives_the_same_images_and_labels(images: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))
    expected = {np.asarray(Image.open(file)).tobytes(): file.parent.name for file in files}
    table = pd.DataFrame(
        {
            "image": [str(f.relative_to(tmp_path)) for f in files],
            "label": [f.parent.name for f in files],
        }
    )
    table.to_csv(tmp_path / "table.csv", index=False)
    rows = {
        "image": [{"bytes": f.read_bytes(), "path": f.name} for f in files],
        "label": table["label"],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    classes = tmp_path / "classes.txt"
    classes.write_text("blue\ngreen, lime\nred\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for index, file in enumerate(files):
            number = str(["blue", "green", "red"].index(file.parent.name)).encode()
            for ending, data in (("png", file.read_bytes()), ("cls", number)):
                info = tarfile.TarInfo(f"{index:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert pixels(load_labelled(f"imagefolder:{images}")) == expected
    assert pixels(load_labelled(f"imagefolder:{images}@train")) == expected
    assert pixels(load_labelled(f"csv:{tmp_path}/table.csv")) == expected
    assert pixels(load_labelled(f"parquet:{tmp_path}/table.parquet")) == expected
    named = {key: {"green": "green, lime"}.get(name, name) for key, name in expected.items()}
    assert pixels(load_labelled(f"csv:{tmp_path}/table.csv", classes=classes)) == named
    web = {"image_column": "png", "label_column": "cls", "classes": classes}
    assert pixels(load_labelled(f"webdataset:{tmp_path}/shard.tar", **web)) == named  # type: ignore[arg-type]
    stream = load_labelled(f"csv:{tmp_path}/table.csv", classes=classes, streaming=True)
    assert pixels(stream) == named


def items(
    data: Any,
    *,
    epoch: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    workers: int = 0,
) -> list[Any]:
    data.templates = ["a {}", "the {}"]
    examples = Examples(data, transform, seed)
    loader = batches(examples, 4, epoch=epoch, start=start, rank=rank, world=world, workers=workers)
    return [(b["labels"].tolist(), b["texts"], b["pixels"].sum().item()) for b in loader]


@pytest.mark.parametrize("streaming", [False, True])
def test_order_depends_on_seed_and_epoch_alone(
    images: Path, tmp_path: Path, streaming: bool
) -> None:
    if streaming:
        files = sorted(images.rglob("*.png"))
        rows = {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
        pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
        (tmp_path / "classes.txt").write_text("blue\ngreen\nred\n")
        data = load_labelled(
            f"csv:{tmp_path}/table.csv", classes=tmp_path / "classes.txt", streaming=True
        )
    else:
        data = load_labelled(f"imagefolder:{images}")
    torch.manual_seed(1)
    first = items(data)
    torch.manual_seed(2)
    assert items(data) == first and len(first) == 6
    assert items(data, start=8 if streaming else 2) == first[2:]
    others = [items(data, epoch=1), items(data, seed=1)]
    for other in others:  # not only augmented in another way
        assert [labels for labels, *_ in other] != [labels for labels, *_ in first]
    halves = [items(data, rank=rank, world=2) for rank in range(2)]
    seen = [label for half in halves for labels, *_ in half for label in labels]
    assert sorted(seen) == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_take_equal_shares_of_what_they_can_not_divide(images: Path, world: int) -> None:
    """23 images: a process with a batch more than another would wait for it for ever."""
    (images / "red" / "7.png").unlink()
    data = load_labelled(f"imagefolder:{images}")
    examples = Examples(data, transform, 0)
    shares = [
        list(
            batches(examples, 4, epoch=0, start=0, rank=rank, world=world, workers=0).batch_sampler  # type: ignore[arg-type]
        )
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {23 // world // 4}
    seen = [index for share in shares for batch in share for index in batch]
    assert len(seen) == len(set(seen))


def test_workers_change_nothing(images: Path) -> None:
    data = load_labelled(f"imagefolder:{images}")
    assert items(data, workers=2) == items(data)


def test_broken_and_missing_images(images: Path) -> None:
    data = load_labelled(f"imagefolder:{images}")
    (images / "red" / "3.png").write_bytes(b"\x89PNG not really")
    (images / "red" / "4.png").unlink()
    refusing = Examples(data, transform, 0)
    errors = [
        b["error"]
        for b in batches(refusing, 4, epoch=0, start=0, rank=0, world=1, workers=0)
        if "error" in b
    ]
    assert (
        all(re.search(r"red/[34]\.png can't be read.*--on-broken skip", error) for error in errors)
        and errors
    )
    examples = Examples(data, transform, 0, refuse=False)
    seen = list(batches(examples, 4, epoch=0, start=0, rank=0, world=1, workers=0))
    assert len(seen) == 6 and all(len(b["labels"]) == 4 for b in seen)
    broken = {name.split(" can't")[0].rsplit("/", 1)[-1] for b in seen for name in b["broken"]}
    assert broken == {"3.png", "4.png"}


def test_what_is_wrong_with_a_row_travels_as_its_batch(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def item(self: Examples, row: Any, index: int) -> dict[str, Any]:
        raise RAdapterError(f"row {index} is odd")

    monkeypatch.setattr(Examples, "item", item)
    examples = Examples(load_labelled(f"imagefolder:{images}"), transform, 0)
    found = next(iter(batches(examples, 4, epoch=0, start=0, rank=0, world=1, workers=0)))
    assert re.fullmatch(r"row \d+ is odd", found["error"]) and set(found) == {"error"}


def test_a_label_that_is_no_class(tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("blue\ngreen\n")
    for labels, shown in (
        (["blue", "purple"], "'purple'"),
        ([0, 0.9], "0.9"),
        ([1, 2], "2"),
        ([True, False], "True"),
    ):
        pd.DataFrame({"image": ["a.png", "b.png"], "label": labels}).to_csv(
            tmp_path / "t.csv", index=False
        )
        with pytest.raises(RAdapterError, match=f"label {shown} is none of the 2 classes"):
            load_labelled(f"csv:{tmp_path}/t.csv", classes=classes)
    pd.DataFrame({"image": ["a.png", "b.png"], "label": [0.0, 1.0]}).to_csv(
        tmp_path / "t.csv", index=False
    )
    assert load_labelled(f"csv:{tmp_path}/t.csv", classes=classes).labels().tolist() == [0, 1]


def test_labels_by_synonym_line_and_first_name(tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("red, dark\ndark, night\n")
    names = ["red", "dark", "night", "red, dark"]
    pd.DataFrame({"image": ["a.png"] * 4, "label": names}).to_csv(tmp_path / "t.csv", index=False)
    data = load_labelled(f"csv:{tmp_path}/t.csv", classes=classes)
    assert [data.label(row) for row in data.rows] == [0, 1, 1, 0]
    pd.DataFrame({"image": ["a.png"] * 3, "label": ["red", "dark", None]}).to_csv(
        tmp_path / "t.csv", index=False
    )
    for file in (classes, None):
        with pytest.raises(RAdapterError, match="label None is none of the 2 classes"):
            load_labelled(f"csv:{tmp_path}/t.csv", classes=file)


def test_empty_class(images: Path, tmp_path: Path) -> None:
    (images / "yellow").mkdir()
    with pytest.raises(
        RAdapterError, match="1 class folders of .* hold no image: 'yellow'; add some"
    ):
        load_labelled(f"imagefolder:{images}")
    (tmp_path / "classes.txt").write_text("blue\nred\n")
    pd.DataFrame({"image": ["a.png"], "label": ["blue"]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(RAdapterError, match="1 of 2 classes have no image in .*: 'red'; add"):
        load_labelled(f"csv:{tmp_path}/t.csv", classes=tmp_path / "classes.txt")


def test_what_can_not_be_read(images: Path, tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match="no folder"):
        load_labelled(f"imagefolder:{tmp_path}/nowhere")
    with pytest.raises(RAdapterError, match="could not read"):
        load_labelled(f"csv:{tmp_path}/nowhere.csv")
    pd.DataFrame({"picture": ["a.png"], "label": ["blue"]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(
        RAdapterError, match="no column 'image'; its columns: picture, label; see --image-column"
    ):
        load_labelled(f"csv:{tmp_path}/t.csv")
    shutil.rmtree(images / "red")
    shutil.rmtree(images / "green")
    with pytest.raises(RAdapterError, match="one sub-folder a class, and two classes"):
        load_labelled(f"imagefolder:{images}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "No columns to parse"),
        (b"image,label\n", "it holds no rows"),
        (
            "image,label\na.png,grün\n".encode("latin-1"),
            "'utf-8' codec can't decode.*save the file as UTF-8",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(RAdapterError, match=message):
        load_labelled(f"csv:{tmp_path}/t.csv")


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\na.png,cat\nb.png,cat\n")
    with pytest.raises(RAdapterError, match="has the one class 'cat'"):
        open_data(Recipe(data=f"csv:{tmp_path}/t.csv"), None)  # type: ignore[arg-type]


def test_sixteen_bits_of_gray_keep_their_upper_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("a", "b"):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("image,label\na.png,x\nb.png,y\n")
    data = load_labelled(f"csv:{tmp_path}/t.csv")
    image, _, _ = data.pair(data.rows[0], random.Random(0))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[..., 1], values // 256)
    served = decode_pixels((tmp_path / "a.png").read_bytes(), Preprocess((64, 64)))
    np.testing.assert_array_equal(served[..., 1], values // 256)


def test_a_share_of_each_class_is_held_out_for_validation(images: Path) -> None:
    for number in range(7):
        (images / "red" / f"{number}.png").unlink()  # one is left, which is trained with
    recipe = Recipe(data=f"imagefolder:{images}", val_fraction=0.25, shots=2)
    data, val = open_data(recipe, None)  # type: ignore[arg-type]
    assert isinstance(data, Labelled) and isinstance(val, Labelled)
    names = [{part.name(row) for row in part.rows} for part in (data, val)]
    assert not names[0] & names[1]
    assert np.bincount(data.labels()).tolist() == [2, 2, 1] and np.bincount(
        val.labels()
    ).tolist() == [2, 2]
    again = open_data(recipe, None)[1]  # type: ignore[arg-type]
    other = open_data(dataclasses.replace(recipe, seed=1), None)[1]  # type: ignore[arg-type]
    assert (
        {again.name(row) for row in again.rows}  # type: ignore[union-attr]
        == names[1]
        != {other.name(row) for row in other.rows}  # type: ignore[union-attr]
    )
    whole = open_data(dataclasses.replace(recipe, shots=None), None)[0]  # type: ignore[arg-type]
    assert np.bincount(whole.labels()).tolist() == [6, 6, 1]  # type: ignore[union-attr]


def test_held_out_captions_and_segments_keep_an_image_together(tmp_path: Path) -> None:
    rows = [(f"{number}.png", f"{number} {word}") for number in range(5) for word in ("one", "two")]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "t.csv", index=False)
    recipe = Recipe(
        task="retrieval", data=f"csv:{tmp_path}/t.csv", val_fraction=0.4, captions_per_image=2
    )
    data, val = open_data(recipe, None)  # type: ignore[arg-type]
    seen = [[image.captions for image in part.images] for part in (data, val)]  # type: ignore[union-attr]
    assert (len(seen[0]), len(seen[1])) == (3, 2) and val.captions_per_image == 1  # type: ignore[union-attr]
    assert {text for part in seen for captions in part for text in captions} == {
        text for _, text in rows
    }
    masked: Any = Masked(list("abcde"), ["x", "y"])  # type: ignore[arg-type]
    kept, held = masked.held_out(0.4, 0)
    assert sorted([*kept.images, *held.images]) == masked.images and (
        len(kept.images),
        len(held.images),
    ) == (3, 2)
    with pytest.raises(RAdapterError, match="there is one image; name validation data"):
        Masked(masked.images[:1], ["x"]).held_out(0.4, 0)


def test_validation_data_is_evaluated_among_all_classes_of_the_run(
    images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "val", ignore=shutil.ignore_patterns("green"))
    (tmp_path / "val" / "amber").mkdir()
    shutil.copy(images / "red" / "0.png", tmp_path / "val" / "amber")
    recipe = Recipe(data=f"imagefolder:{images}", val_data=f"imagefolder:{tmp_path}/val")
    data, val = open_data(recipe, None)  # type: ignore[arg-type]
    assert isinstance(data, Labelled) and isinstance(val, Labelled)
    assert val.classes == [*data.classes, "amber"] == ["blue", "green", "red", "amber"]
    assert {(Path(val.name(row)).parent.name, val.classes[val.label(row)]) for row in val.rows} == {
        (name, name) for name in ("amber", "blue", "red")
    }
    base = open_data(dataclasses.replace(recipe, class_split="base"), None)[1]  # type: ignore[arg-type]
    assert isinstance(base, Labelled) and base.classes == ["blue", "green"]
    assert np.bincount(base.labels()).tolist() == [8]
    suite = own_validation(
        Metadata("ViT-B-32", "sha256:0", recipe=recipe.to_dict(), classes=data.classes)
    )
    evaluated = open_set(suite, suite.entries[0])
    assert isinstance(evaluated, ClassificationSet) and evaluated.classes == val.classes
    assert evaluated.labels.tolist() == val.labels().tolist()


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_the_share_that_training_held_out_is_the_run_s_own_validation_data(
    task: str, images: Path, tmp_path: Path
) -> None:
    files = sorted(images.rglob("*.png"))
    rows = [(str(file), f"photo {file.stem}") for file in files]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "t.csv")
    data = f"csv:{tmp_path}/t.csv" if task == "retrieval" else f"imagefolder:{images}"
    recipe = Recipe(task=task, data=data, val_fraction=0.25, seed=3)  # type: ignore[arg-type]
    val = open_data(recipe, None)[1]  # type: ignore[arg-type]
    assert isinstance(val, Labelled | Captioned)
    held = val.rows if isinstance(val, Labelled) else [val.table[image.row] for image in val.images]
    classes = val.classes if isinstance(val, Labelled) else None
    suite = own_validation(
        Metadata("ViT-B-32", "sha256:0", task=task, recipe=recipe.to_dict(), classes=classes)  # type: ignore[arg-type]
    )
    evaluated = open_set(suite, suite.entries[0])
    assert {evaluated.images[number].name for number in range(len(evaluated))} == {
        val.name(row) for row in held
    }
    assert len(evaluated) == len(held) == 6


def test_names_of_splits_in_folders_of_images(images: Path) -> None:
    (images / "red").rename(images / "train")
    (images / "blue" / "0.png").rename(images / "blue" / "test-0.png")
    data = load_labelled(f"imagefolder:{images}")
    assert data.classes == ["blue", "green", "train"] and len(data.rows) == 24
    root = images.parent / "split"
    for split, names in (("train", ("blue", "green")), ("val", ("blue",))):
        for name in names:
            shutil.copytree(images / name, root / split / name)
    assert len(load_labelled(f"imagefolder:{root}").rows) == 16
    shutil.copytree(images / "green", root / "val" / "green")
    assert load_labelled(f"imagefolder:{root}@val").classes == ["blue", "green"]
    with pytest.raises(RAdapterError, match="no folder .*split/test"):
        load_labelled(f"imagefolder:{root}@test")


def test_openai_templates_are_all_eighty() -> None:
    templates = templates_of("openai")
    assert len(set(templates)) == 80 and all(template.count("{}") == 1 for template in templates)
