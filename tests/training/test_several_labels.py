"""Several labels an image: read from texts and from lists, and trained and evaluated as by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from radapter_serve import evaluate
from radapter_serve.adapter import load_adapter
from radapter_serve.data.labelled import class_split, few_shot, load_labelled
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.run import open_set
from radapter_serve.evaluation.suite import Suite, entry_of
from radapter_serve.training import Recipe, train
from radapter_serve.training.data import open_run
from tests.helpers.by_hand import ClipWithAdapters, Pair
from tests.helpers.short_run import short_run
from tests.training.test_wiring import (
    CLASSES,
    FIELDS,
    TEMPLATES,
    assert_trains_as_by_hand,
    prompts,
    tabled,
)

# Of each image, in its own order.
SETS = [*[(0, 2), (1,), (2, 1), (0,), (2,), (0, 1, 2)], *[(1, 0), (2,), (1,), (0,), (2, 0)]]


def several(folder: Path, kind: str, seed: int = 0) -> tuple[str, list[Pair]]:
    """Images with one to three labels in one of the forms that are read, and the same as pairs."""
    names = [[CLASSES[label] for label in labels] for labels in SETS]
    texts = [[" ; ".join(of) + ";"] for of in names]
    data, images = tabled(folder, "label", texts, seed)
    pairs = []
    for image, labels in zip(images, SETS, strict=True):
        prompts_of = {label: prompts(CLASSES[label]) for label in labels}
        pairs.append(Pair(image, labels[0], prompts_of[labels[0]], prompts_of))
    if kind == "lists":
        files = [f"{number}.png" for number in range(len(SETS))]
        pd.DataFrame({"image": files, "label": names}).to_parquet(folder / "rows.parquet")
        data = f"parquet:{folder}/rows.parquet"
    return data, pairs


def test_training_is_as_by_hand(tiny_clip_dir: str, tmp_path: Path) -> None:
    data, pairs = several(tmp_path / "data", "text")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    recipe = short_run(
        tiny_clip_dir,
        tmp_path,
        data=data,
        templates=str(tmp_path / "templates.txt"),
        label_separator=";",
        negative_classes=2,
        **FIELDS | {"accumulate": 2},  # parts of two images, which lack classes
    )
    assert_trains_as_by_hand(recipe, pairs, prompts=[prompts(name) for name in CLASSES])


def test_evaluation_is_as_by_hand(
    tiny_clip_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, _ = several(Path("data"), "text")
    val, pairs = several(Path("val"), "lists", seed=1)
    fields: dict[str, Any] = FIELDS | {"weight_decay": 0.0, "alpha": 1.0, "label_separator": ";"}
    run = train(short_run(tiny_clip_dir, tmp_path, data=data, val_data=val, **fields))
    assert "note: 5 of 11 images have several labels" in run.notes
    clip = ClipWithAdapters(tiny_clip_dir, load_adapter(run).tensors)
    with torch.no_grad():
        classes = clip.texts([f"a photo of a {name}." for name in CLASSES])
        images = clip.images(torch.stack([clip.transform(pair.image) for pair in pairs]))
    scores = (images @ classes.T).numpy()
    truth = np.array([[label in of for label in range(3)] for of in SETS])
    hits = np.mean([truth[i, scores[i].argmax()] for i in range(len(SETS))])
    assert run.metrics == {"acc1@alpha=1": pytest.approx(hits, abs=1e-4)}

    # The precision among those that score as high, over the images that have the class.
    each = []
    for of_class, right in zip(scores.T, truth.T, strict=True):
        high = [right[of_class >= of_class[i]].mean() for i in np.flatnonzero(right)]
        each.append(np.mean(high))
    (row,) = evaluate(run, 1.0, data=val, out=tmp_path / "results").rows
    expected = {"mean_average_precision": np.mean(each), "acc1": hits}
    assert {name: row.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(row.metrics) == {*expected, "kept"}
    assert [of.n for of in row.per_class or ()] == truth.sum(axis=0).tolist()


def test_what_is_held_out_leaves_every_class_an_image(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "all;rare" if i < 2 else "all;often") for i in range(12)]
    rows += [("12.png", "one;rare")]
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "t.csv", index=False)
    data = load_labelled(DataSource(f"csv:{tmp_path}/t.csv", label_separator=";"))
    assert data.classes == ["all", "often", "one", "rare"]
    assert data.labels().tolist() == [3, 3, *[1] * 10, 2]  # the rarest of each
    for seed in range(8):
        rest, validation = data.held_out(0.5, seed)
        assert {label for of in rest.label_sets() for label in of} == {0, 1, 2, 3}
        assert len(rest.rows) + len(validation.rows) == 13 and len(validation.rows) >= 5
        few = few_shot(data, 2, seed)
        assert np.bincount(few.labels(), minlength=4).tolist()[1:] == [2, 1, 2]


def test_few_shots_leave_every_class_an_image(tmp_path: Path) -> None:
    # "wide" stands beside half the images of each of the others, which are rarer.
    labels = [name + beside for name in "abc" for beside in ("", ";wide") for _ in range(3)]
    rows = [(f"{number}.png", label) for number, label in enumerate(labels)]
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "t.csv", index=False)
    data = load_labelled(DataSource(f"csv:{tmp_path}/t.csv", label_separator=";"))
    sizes = set()
    for seed in range(20):
        draws = [few_shot(data, shots, seed) for shots in (1, 2, 6)]
        for few in draws:
            assert {label for of in few.label_sets() for label in of} == {0, 1, 2, 3}
        names = [{row["image"] for row in few.rows} for few in draws]
        assert names[0] <= names[1] <= names[2] and len(names[2]) == len(labels)
        sizes.add(len(names[0]))
    assert sizes == {3, 4}


def test_what_is_refused_or_noted(tmp_path: Path) -> None:
    data, _ = several(tmp_path / "data", "text")
    # A semicolon is a part of a name unless it separates.
    recipe = Recipe(data=data)
    assert len(load_labelled(recipe).classes) == len({";".join(map(str, of)) for of in SETS})
    notes = open_run(recipe, progress=False).notes
    assert any("hold a semicolon" in note and "--label-separator ';'" in note for note in notes)
    with pytest.raises(RAdapterError, match="class_split base needs one label an image"):
        class_split(load_labelled(DataSource(data, label_separator=";")), "base")
    plain = {"name": "x", "data": data, "metric": "mean_average_precision"}
    with pytest.raises(RAdapterError, match="for images with several labels; leave it out"):
        open_set(Suite("s", ()), entry_of(plain, "s"))
    chosen = entry_of({**plain, "label_separator": ";", "metric": "acc1"}, "s")
    assert open_set(Suite("s", ()), chosen).entry.metric == "mean_average_precision"
    (tmp_path / "t.csv").write_text("image,label\na.png,cat\nb.png,dog\nc.png, ; \n")
    with pytest.raises(RAdapterError, match=r"image c\.png has no label in 'label'; take it out"):
        load_labelled(DataSource(f"csv:{tmp_path}/t.csv", label_separator=";"))
