"""Few-shot draws, the base-to-novel split, and training of one tower alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from radapter_serve.adapter import attach_adapter, fold, load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.data.labelled import (
    Labelled,
    class_split,
    few_shot,
    load_labelled,
)
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, train
from radapter_serve.training.tasks import open_run
from tests.helpers.short_run import short_run
from tests.helpers.small_models import make_base


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    """Five classes with 6, 6, 2, 6 and 6 rows, as names."""
    sizes = {"a": 6, "b": 6, "c": 2, "d": 6, "e": 6}
    rows = [(f"{name}{index}.png", name) for name, size in sizes.items() for index in range(size)]
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "t.csv", index=False)
    return load_labelled(f"csv:{tmp_path}/t.csv")


def drawn(data: Labelled) -> dict[str, set[str]]:
    """The images of each class."""
    images: dict[str, set[str]] = {}
    for row in data.rows:
        images.setdefault(data.classes[data.label(row)], set()).add(row["image"])
    return images


def test_shots_of_each_class_by_the_seed(labelled: Labelled, tmp_path: Path) -> None:
    two = drawn(few_shot(labelled, 2, 1))
    four = drawn(few_shot(labelled, 4, 1))
    assert {name: len(images) for name, images in two.items()} == dict.fromkeys("abcde", 2)
    assert [len(four[name]) for name in "abcde"] == [4, 4, 2, 4, 4]
    assert all(image.startswith(name) for name, images in four.items() for image in images)
    assert all(two[name] <= four[name] for name in two)
    assert drawn(few_shot(labelled, 2, 1)) == two
    draws = [drawn(few_shot(labelled, 2, seed)) for seed in (1, 2, 3)]
    assert all(draws.count(draw) == 1 for draw in draws)
    data = open_run(Recipe(data=f"csv:{tmp_path}/t.csv", shots=2, seed=3), images=False).data
    assert isinstance(data, Labelled) and drawn(data) == draws[2]


@pytest.mark.parametrize("numbers", [False, True])
def test_base_and_novel_classes(labelled: Labelled, tmp_path: Path, numbers: bool) -> None:
    if numbers:
        table = pd.read_csv(tmp_path / "t.csv")
        table["label"] = table["label"].map("abcde".index)
        table.to_csv(tmp_path / "n.csv", index=False)
        (tmp_path / "classes.txt").write_text("\n".join("abcde"))
        labelled = load_labelled(f"csv:{tmp_path}/n.csv", classes=tmp_path / "classes.txt")
    everything = drawn(labelled)
    for half, names in (("base", "abc"), ("novel", "de")):
        data = class_split(labelled, half)  # type: ignore[arg-type]
        assert data.classes == list(names)
        assert drawn(data) == {name: everything[name] for name in names}
        assert drawn(few_shot(data, 1, 1)).keys() == set(names)
    assert class_split(labelled, "all") is labelled


@pytest.mark.parametrize(("rank", "form"), [(None, "activation"), (2, "weight")])
def test_without_text_adapters(
    tiny_clip_dir: str, images: Path, tmp_path: Path, rank: int | None, form: str
) -> None:
    fields: dict[str, Any] = {"adapt_text": False, "rank": rank, "form": form}
    run = train(short_run(tiny_clip_dir, tmp_path, data=f"imagefolder:{images}", **fields))
    adapter = load_adapter(run)
    assert adapter.keys and all(key.startswith("visual.") for key in adapter.keys)
    model: Any = load_base(tiny_clip_dir).model
    state = model.state_dict()
    folded = fold(state, adapter, 0.7)
    changed = [name for name, value in state.items() if not torch.equal(folded[name], value)]
    assert changed and all(name.startswith("visual.") for name in changed)
    other: Any = load_base(tiny_clip_dir).model
    attached = attach_adapter(other, adapter, 0.7)
    assert all(name.startswith("visual.") for name in attached.named_tensors())
    model.load_state_dict(folded)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embeds = other.encode_image(pixels)
        torch.testing.assert_close(embeds, model.encode_image(pixels), rtol=1e-4, atol=1e-5)


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
