"""Few-shot draws, the base-to-novel split, and training of one tower alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radapter_export import ExportSettings, export_release
from radapter_serve.adapter import attach_adapter, fold, load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.data.labelled import (
    Labelled,
    class_split,
    few_shot,
    load_labelled,
    split_classes,
)
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, train
from radapter_serve.training.tasks import open_run
from tests.helpers.short_run import rows, short_run
from tests.helpers.small_models import make_base


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    """Five classes with 6, 6, 2, 6 and 6 rows, as names."""
    rows = [
        (f"{name}{index}.png", name) for name in "abcde" for index in range(2 if name == "c" else 6)
    ]
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "t.csv", index=False)
    return load_labelled(f"csv:{tmp_path}/t.csv")


def drawn(data: Labelled) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in data.rows:
        found.setdefault(data.classes[data.label(row)], set()).add(row["image"])
    return found


def test_shots_of_each_class_by_the_seed(labelled: Labelled) -> None:
    two = drawn(few_shot(labelled, 2, 1))
    four = drawn(few_shot(labelled, 4, 1))
    assert {name: len(images) for name, images in two.items()} == dict.fromkeys("abcde", 2)
    assert {name: len(images) for name, images in four.items()} == {
        "a": 4,
        "b": 4,
        "c": 2,
        "d": 4,
        "e": 4,
    }
    assert all(image.startswith(name) for name, images in four.items() for image in images)
    assert all(two[name] <= four[name] for name in two)
    assert drawn(few_shot(labelled, 2, 1)) == two
    assert (
        len(
            {
                str(sorted(map(sorted, drawn(few_shot(labelled, 2, seed)).values())))
                for seed in (1, 2, 3)
            }
        )
        == 3
    )


def test_a_run_draws_its_shots_by_its_seed(labelled: Labelled, tmp_path: Path) -> None:
    recipe = Recipe(data=f"csv:{tmp_path}/t.csv", shots=2, seed=3)
    found = open_run(recipe, images=False, progress=False).data
    assert isinstance(found, Labelled)
    assert drawn(found) == drawn(few_shot(labelled, 2, 3)) != drawn(few_shot(labelled, 2, 0))


@given(st.integers(1, 50))
def test_halves_of_the_classes(count: int) -> None:
    base = split_classes(count, "base")
    novel = split_classes(count, "novel")
    assert [*base, *novel] == [*split_classes(count, "all")] == list(range(count))
    assert len(base) - len(novel) in (0, 1)


@pytest.mark.parametrize("numbers", [False, True])
def test_base_and_novel_classes(labelled: Labelled, tmp_path: Path, numbers: bool) -> None:
    if numbers:
        table = pd.read_csv(tmp_path / "t.csv")
        table["label"] = table["label"].map("abcde".index)
        table.to_csv(tmp_path / "n.csv", index=False)
        (tmp_path / "classes.txt").write_text("\n".join("abcde"))
        labelled = load_labelled(f"csv:{tmp_path}/n.csv", classes=tmp_path / "classes.txt")
    base = class_split(labelled, "base")
    novel = class_split(labelled, "novel")
    assert base.classes == ["a", "b", "c"] and novel.classes == ["d", "e"]
    assert drawn(base) == {
        name: images for name, images in drawn(labelled).items() if name in "abc"
    }
    assert drawn(novel) == {
        name: images for name, images in drawn(labelled).items() if name in "de"
    }
    assert drawn(few_shot(novel, 1, 1)).keys() == {"d", "e"}
    assert class_split(labelled, "all") is labelled


def test_fields_that_a_stream_or_a_task_has_no_use_for() -> None:
    change: Any
    for change in ({"shots": 4}, {"class_split": "base"}):
        with pytest.raises(RAdapterError, match="leave --streaming out"):
            Recipe(data="csv:t.csv", streaming=True, steps=1, **change).check()
        with pytest.raises(RAdapterError, match="which task retrieval does not use"):
            Recipe(data="csv:t.csv", task="retrieval", **change).check()
    task: Any
    for task, change in (
        ("classification", {"captions_per_image": 2}),
        ("classification", {"mask_min_area": 9}),
        ("retrieval", {"classes": Path("c.txt")}),
        ("retrieval", {"label_column": "c"}),
        ("segmentation", {"class_split": "novel"}),
        ("segmentation", {"image_column": "c"}),
    ):
        with pytest.raises(
            RAdapterError, match=f"{next(iter(change))} is .*, which task {task} does not use"
        ):
            Recipe(data="csv:t.csv", task=task, **change).check()
    with pytest.raises(RAdapterError, match="shots is 0; it should be greater than or equal to 1"):
        Recipe(data="csv:t.csv", shots=0).check()


def test_a_few_shot_run_on_base_classes(tiny_clip_dir: str, images: Path, tmp_path: Path) -> None:
    data = f"imagefolder:{images}"
    few: dict[str, Any] = {"batch_size": 2, "shots": 2, "class_split": "base", "warmup_steps": 0}
    recipe = short_run(
        tiny_clip_dir, tmp_path, data=data, val_data=data, steps=None, epochs=1, **few
    )
    steps = [row for row in rows(train(recipe).folder) if "loss" in row]
    assert len(steps) == 2  # two classes, two images each


@pytest.mark.parametrize(("rank", "form"), [(None, "activation"), (2, "weight")])
def test_without_text_adapters(
    quick: None, tiny_clip_dir: str, images: Path, tmp_path: Path, rank: int | None, form: str
) -> None:
    data = f"imagefolder:{images}"
    own: dict[str, Any] = {
        "steps": 10,
        "warmup_steps": 1,
        "adapt_text": False,
        "rank": rank,
        "form": form,
    }
    recipe = short_run(tiny_clip_dir, tmp_path, data=data, val_data=data, **own)
    adapter = load_adapter(train(recipe))
    assert adapter.keys and all(key.startswith("visual.") for key in adapter.keys)
    base = load_base(tiny_clip_dir)
    folded = fold(base.model.state_dict(), adapter, 0.7)
    changed = {
        name
        for name, value in base.model.state_dict().items()
        if not torch.equal(folded[name], value)
    }
    assert changed and all(name.startswith("visual.") for name in changed)
    other = load_base(tiny_clip_dir)
    pixels = torch.randn(2, 3, 32, 32)
    attached = attach_adapter(other.model, adapter, 0.7)
    base.model.load_state_dict(folded)
    with torch.no_grad():
        found, expected = (
            cast(Any, model).encode_image(pixels) for model in (other.model, base.model)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(name.startswith("visual.") for name in attached.named_tensors())
    if form == "weight":
        settings = ExportSettings(
            model_repository=tmp_path / "model_repository", merged=tmp_path / "merged"
        )
        (release,) = export_release(tmp_path / "run", [0.7], settings)
        assert all(
            graph.agreement.max_error < 1e-4 for graph in release.graphs
        )  # against the base with adapters


def test_partial_adapts_the_text_tower_of_a_convolutional_clip(
    images: Path, tmp_path: Path
) -> None:
    name = make_base("resnet", tmp_path / "base")
    data = f"imagefolder:{images}"
    with pytest.raises(RAdapterError, match=r"image tower .*ModifiedResNet.*--partial"):
        train(short_run(name, tmp_path, data=data))
    assert not (tmp_path / "run").exists()
    adapter = load_adapter(train(short_run(name, tmp_path, data=data, steps=3, partial=True)))
    assert {key.split(".")[0] for key in adapter.keys} == {"transformer"}
    assert adapter.metadata.recipe["partial"] is True
