"""Labels in doubt against margins computed by hand in float64, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.cli.eval import main
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.doubtful import Doubtful, _draw
from radapter_serve.evaluation.start import doubtful
from tests.evaluation.conftest import picture
from tests.helpers.by_hand import ClipWithAdapters

CLASSES = ["cat", "dog", "tree"]


@pytest.fixture
def run(random_adapter: Callable[..., Adapter], tmp_path: Path) -> Path:
    """A run whose data is 12 images of three classes."""
    generator = np.random.default_rng(0)
    for index in range(12):
        folder = tmp_path / "images" / CLASSES[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(generator).save(folder / f"{index}.png")
    recipe = {"data": f"imagefolder:{tmp_path / 'images'}", "val_fraction": 0.25}
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    adapter = random_adapter(recipe=recipe, templates=["a photo of a {}."], classes=CLASSES)
    save_adapter(adapter, folder / "adapter.safetensors")
    return folder


def test_images_are_listed_by_what_both_models_doubt(
    run: Path, random_adapter: Callable[..., Adapter], tiny_clip_dir: str, tmp_path: Path
) -> None:
    files = sorted((tmp_path / "images").rglob("*.png"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    clip = ClipWithAdapters(tiny_clip_dir, random_adapter().tensors)
    pixels = torch.stack([clip.transform(Image.open(file)) for file in files])
    least = np.full(len(files), np.inf)
    for alpha in (0.0, 1.0):
        with clip.at(alpha):
            texts = clip.texts([f"a photo of a {name}." for name in CLASSES]).double()
            cosines = (clip.images(pixels).double() @ texts.T).numpy()
        others = [max(np.delete(row, own)) for row, own in zip(cosines, labels, strict=True)]
        own = cosines[np.arange(len(files)), labels]
        least = np.minimum(least, np.array(others) - own)
    expected = [str(files[number]) for number in np.argsort(-least)[:5]]

    found, (table, drawn) = doubtful(run, 5, out=tmp_path / "out", batch_size=5)
    assert [one.image for one in found] == expected
    margins_found = [min(one.base_margin, one.run_margin) for one in found]
    assert margins_found == pytest.approx(np.sort(least)[::-1][:5], abs=1e-4)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [row["image"] for row in rows] == expected
    assert all(row["label"] == Path(row["image"]).parent.name for row in rows)
    assert all(row["label"] not in (row["base_says"], row["run_says"]) for row in rows)
    with Image.open(drawn) as sheet:
        assert sheet.width > 1000 and drawn.name == "doubtful.png"


def test_the_command_lists_and_refuses(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--adapter", str(run), "--doubtful", "3"]) == 0
    out = capsys.readouterr().out
    assert "the base says" in out and out.count(".png") >= 3
    assert "wrote results/tiny/training/doubtful.csv" in out
    for flags, message in (
        (["3", "--suite", "pacs"], "doubtful and suite don't go together"),
        (["3", "--seed", "1"], "doubtful and seed don't go together"),
        (["3", "--batch-size", "0"], "batch_size is 0"),
        (["0"], "doubtful is 0"),
    ):
        assert main(["--adapter", str(run), "--doubtful", *flags]) == 2
        assert message in capsys.readouterr().err


def test_names_of_classes_are_no_formulas(tmp_path: Path) -> None:
    picture(np.random.default_rng(0)).save(tmp_path / "a.png")
    images: Any = SimpleNamespace(images=[(tmp_path / "a.png").read_bytes])
    one = Doubtful("a.png", r"$\broken{$", "cat", "dog", 0.1, 0.2, 0)
    assert _draw([one], images, tmp_path / "doubtful.png").is_file()


def test_what_has_no_one_label_an_image_is_refused(
    random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    for recipe, task, message in (
        ({"data": "csv:x.csv"}, "retrieval", "was trained for retrieval"),
        ({}, "classification", "does not say from what"),
        ({"data": f"csv:{tmp_path}/t.csv", "label_separator": ";"}, "classification", "several"),
    ):
        (tmp_path / "t.csv").write_text("image,label\na.png,cat;dog\nb.png,dog\n")
        path = tmp_path / "adapter.safetensors"
        save_adapter(random_adapter(recipe=recipe, task=task), path)
        with pytest.raises(RAdapterError, match=message):
            doubtful(path, 5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
