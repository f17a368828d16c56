"""Whole runs with captions: they resume, share processes, and say what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.adapter import load_adapter
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, train
from tests.helpers.by_hand import assert_same
from tests.helpers.short_run import short_run
from tests.training.test_wiring import captioned


@pytest.fixture
def recipe(tiny_clip_dir: str, tmp_path: Path) -> Recipe:
    """16 images with 40 captions, as rows."""
    data, _ = captioned(tmp_path / "data", 16, seed=1)
    return short_run(tiny_clip_dir, tmp_path, task="retrieval", data=data, val_data=data)


@pytest.mark.parametrize(
    "change", [{}, {"captions_per_image": 2, "accumulate": 2}, {"streaming": True}]
)
def test_a_killed_run_resumes_to_the_same_result(
    recipe: Recipe, assert_resumes: Callable[[Recipe, int], None], change: dict[str, Any]
) -> None:
    assert_resumes(dataclasses.replace(recipe, val_data=None, **change), 6)


@pytest.mark.slow
@pytest.mark.parametrize("captions_per_image", [1, 2])
def test_two_processes_train_to_the_same_adapter_as_one(
    recipe: Recipe, tmp_path: Path, train_in_two_processes: Any, captions_per_image: int
) -> None:
    recipe = dataclasses.replace(recipe, captions_per_image=captions_per_image)
    one = load_adapter(train(recipe))
    train_in_two_processes(recipe, tmp_path / "two")
    two = load_adapter(tmp_path / "two")
    assert two.metadata.metrics == one.metadata.metrics
    assert_same(two.tensors, one.tensors)


def test_broken_images_and_rows_without_captions(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data" / "0.png").write_bytes(b"no image")
    with (tmp_path / "data" / "rows.csv").open("a") as file:
        file.write("1.png,\n")
    with pytest.raises(RAdapterError, match=r"row 41 of .* has no text in 'caption'"):
        train(recipe)
    out = train(dataclasses.replace(recipe, on_broken="skip", out=tmp_path / "skipped")).folder
    broken = (out / "broken.txt").read_text()
    assert "0.png can't be read: 8 bytes are not an image\n" in broken and "row 41 of" in broken
    assert load_adapter(out).metadata.metrics  # the broken image is in the validation data too


def test_images_in_another_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data" / "rows.csv").rename(tmp_path / "rows.csv")
    few: dict[str, Any] = {"val_data": None, "steps": 1, "warmup_steps": 0}
    recipe = dataclasses.replace(recipe, data=f"csv:{tmp_path}/rows.csv", **few)
    with pytest.raises(RAdapterError, match="can't be read"):
        train(recipe)
    assert train(dataclasses.replace(recipe, images=tmp_path / "data")).adapter.exists()
