"""The trainer against training by hand: each field of a recipe does what the paper says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.evaluation.alpha_choice import choose
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.rows import Results
from radapter_serve.evaluation.run import evaluate_suite, own_validation
from radapter_serve.training import Recipe, Run, loop, train
from radapter_serve.training.data import open_run
from radapter_serve.training.loop import fit
from radapter_serve.training.setup import Learner, build
from radapter_serve.training.validation import validate
from tests.helpers.by_hand import (
    ClipWithAdapters,
    Pair,
    Weights,
    accuracy_by_hand,
    assert_same,
    assert_same_steps,
    recall_by_hand,
    steps_taken,
    train_by_hand,
)
from tests.helpers.short_run import rows, short_run

CLASSES = ["bird", "fish", "snake"]
TEMPLATES = ["a photo of a {}.", "{}", "the drawing of one {}", "many a {} here"]
# every one large enough to be seen in a few steps
FIELDS: dict[str, Any] = {
    "batch_size": 4,
    "steps": 7,
    "warmup_steps": 3,
    "learning_rate": 1e-2,
    "min_learning_rate": 4e-3,
    "weight_decay": 5.0,
    "momentum": 0.8,
    "drop": 0.4,
    "epsilon": 0.1,
    "delta": 0.1,
    "grad_clip": 1.5,
    "crop_scale": 0.5,
    "seed": 5,
    "save_every": None,
}


def picture(generator: np.random.Generator) -> Image.Image:
    """44 by 36 pixels of coarse noise, in which left and right differ."""
    return Image.fromarray(generator.integers(0, 255, (9, 11, 3), dtype=np.uint8)).resize(
        (44, 36), Image.Resampling.BOX
    )


def prompts(name: str) -> list[str]:
    return [template.replace("{}", name) for template in TEMPLATES]


def tabled(
    folder: Path, column: str, texts: Sequence[Sequence[str]], seed: int
) -> tuple[str, list[Image.Image]]:
    """Images and a table of them, with a row for each text of an image."""
    generator = np.random.default_rng(seed)
    images = [picture(generator) for _ in texts]
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    rows = [(f"{number}.png", text) for number, of in enumerate(texts) for text in of]
    pd.DataFrame(rows, columns=["image", column]).to_csv(folder / "rows.csv", index=False)
    return f"csv:{folder}/rows.csv", images


def labelled(folder: Path, count: int, seed: int) -> tuple[str, list[Pair]]:
    """A table of images with labels, and the same as pairs."""
    labels = [number * 2 % 3 for number in range(count)]
    data, images = tabled(folder, "label", [[CLASSES[label]] for label in labels], seed)
    pairs = zip(images, labels, strict=True)
    return data, [Pair(image, label, prompts(CLASSES[label])) for image, label in pairs]


def captioned(folder: Path, count: int, seed: int) -> tuple[str, list[Pair]]:
    """A table of images with two or three captions each, one a row, and the same as pairs."""
    captions = [
        [f"picture {number} in way {way}" for way in range(2 + number % 2)]
        for number in range(count)
    ]
    data, images = tabled(folder, "caption", captions, seed)
    return data, [Pair(image, number, captions[number]) for number, image in enumerate(images)]


def masked(
    folder: Path, count: int, padding: float, fill: tuple[int, ...]
) -> tuple[str, list[Pair]]:
    """Images with an ellipse of each class, and their square crops on a filled ground as pairs."""
    generator = np.random.default_rng(4)
    pairs = []
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    y, x = np.mgrid[:36, :44]
    for number in range(count):
        image = picture(generator)
        ids = np.full((36, 44), 255, np.uint8)
        for label in range(3):
            height = generator.integers(4, 16)
            width = generator.integers(4, 7)
            ids[((y - 17) / height) ** 2 + ((x - 7 - 14 * label) / width) ** 2 < 1] = label
        image.save(folder / "images" / f"{number}.png")
        Image.fromarray(ids).save(folder / "masks" / f"{number}.png")
        for label, name in enumerate(CLASSES):
            inside = ids == label
            ys, xs = np.nonzero(inside)
            box = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            pixels = np.where(inside[..., None], np.asarray(image), np.array(fill, np.uint8))[box]
            longer = max(pixels.shape[:2])
            side = longer + 2 * round(padding * longer)
            crop = np.full((side, side, 3), fill, np.uint8)
            top, left = ((side - length + 1) // 2 for length in pixels.shape[:2])
            crop[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            pairs.append(Pair(Image.fromarray(crop), label, prompts(name)))
    return f"masks:{folder}", pairs


@pytest.fixture
def recipe(tiny_clip_dir: str, tmp_path: Path) -> Recipe:
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    return short_run(tiny_clip_dir, tmp_path, templates=str(tmp_path / "templates.txt"), **FIELDS)


def assert_trains_as_by_hand(
    recipe: Recipe, pairs: list[Pair], how: Callable[[Recipe], Run] = train, **by_hand: Any
) -> None:
    with steps_taken() as expected_steps:
        expected = train_by_hand(recipe, pairs, **by_hand)
    with steps_taken() as steps:
        run = how(recipe)
    assert_same_steps(steps, expected_steps)
    assert_same(load_adapter(run).tensors, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"flip": True, "bias_correction": True, "grad_clip": None},
        {"accumulate": 2, "form": "weight", "preserve": 20.0, "positives": "single"}
        | {"negative_classes": 9},
        {"preserve": 2.0, "preserve_words": 3.0, "negative_classes": 9, "accumulate": 2},
        {"negative_classes": 1, "batch_size": 2},  # of one or two that a batch has not
    ],
)
def test_classification(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    # Fewer words than a run draws, as most of the time went into them.
    monkeypatch.setattr("radapter_serve.training.loop.WORDS", 8)
    data, pairs = labelled(tmp_path / "data", 11, seed=0)  # no multiple of the batch
    recipe = dataclasses.replace(recipe, data=data, **change)
    texts = [prompts(name) for name in CLASSES]
    assert_trains_as_by_hand(recipe, pairs, prompts=texts, words_of=CLASSES, words_drawn=8)


def test_a_base_with_a_bias_learns_by_its_sigmoids(
    recipe: Recipe, tmp_path: Path, tiny_clip_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sigmoid = tmp_path / "sigmoid"
    shutil.copytree(tiny_clip_dir.removeprefix("local-dir:"), sigmoid)
    config = json.loads((sigmoid / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -10.0
    (sigmoid / "open_clip_config.json").write_text(json.dumps(config))
    weights = load_file(sigmoid / "open_clip_model.safetensors")
    weights["logit_bias"] = torch.tensor(-2.5)
    save_file(weights, sigmoid / "open_clip_model.safetensors")
    data, pairs = labelled(tmp_path / "data", 11, seed=0)
    recipe = dataclasses.replace(recipe, data=data, architecture=f"local-dir:{sigmoid}")
    assert_trains_as_by_hand(recipe, pairs, lambda recipe: train(recipe, progress=True))
    assert "; pairwise sigmoid loss, as the base is scored" in "".join(capfd.readouterr())


def test_low_rank(recipe: Recipe, tmp_path: Path) -> None:
    data, pairs = labelled(tmp_path / "data", 11, seed=0)
    recipe = dataclasses.replace(recipe, data=data, rank=3)
    still: dict[str, Any] = {"steps": 1, "learning_rate": 1e-20, "min_learning_rate": 0.0}
    first = dataclasses.replace(recipe, **still, warmup_steps=0, out=tmp_path / "start")
    start = load_adapter(train(first)).tensors
    assert_same(load_adapter(train(recipe)).tensors, train_by_hand(recipe, pairs, start))


@pytest.mark.parametrize("captions_per_image", [1, 2])
def test_retrieval(recipe: Recipe, tmp_path: Path, captions_per_image: int) -> None:
    data, pairs = captioned(tmp_path / "data", 6, seed=1)
    fields: dict[str, Any] = {"templates": "simple", "captions_per_image": captions_per_image}
    recipe = dataclasses.replace(recipe, task="retrieval", data=data, **fields)
    if captions_per_image == 1:  # each caption comes by itself, with its image
        pairs = [
            Pair(pair.image, pair.label, [caption]) for pair in pairs for caption in pair.texts
        ]
    assert_trains_as_by_hand(recipe, pairs)


def test_segmentation(recipe: Recipe, tmp_path: Path) -> None:
    mean = (122, 117, 105)  # of the tiny CLIP
    data, pairs = masked(tmp_path / "data", 4, padding=0.2, fill=mean)
    fields: dict[str, Any] = {"mask_padding": 0.2, "mask_min_area": 1, "negative_classes": 2}
    recipe = dataclasses.replace(recipe, task="segmentation", data=data, **fields)
    assert_trains_as_by_hand(recipe, pairs, prompts=[prompts(name) for name in CLASSES])


def test_validation_on_the_way_and_the_choice_of_alpha(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, pairs = labelled(tmp_path / "data", 11, seed=0)
    val_data, val = labelled(tmp_path / "val", 45, seed=2)
    recipe = dataclasses.replace(recipe, data=data, val_data=val_data, validate_every=3, alpha=0.6)
    by_hand: dict[int, Weights] = {}
    train_by_hand(recipe, pairs, see=by_hand.__setitem__)
    validated: list[Weights] = []

    def validate_and_see(learner: Learner) -> dict[str, float]:
        validated.append({name: t.clone() for name, t in learner.average.tensors.items()})
        return validate(learner)

    assert recipe.out is not None
    monkeypatch.setattr(loop, "validate", validate_and_see)
    out = fit(recipe, open_run(recipe), recipe.out).folder
    classes = [prompts(name) for name in CLASSES]
    scores = {}
    measured = [row for row in rows(out) if "acc1@alpha=1" in row]
    assert [row["step"] for row in measured] == [3, 6, 7]
    for row, weights in zip(measured, validated, strict=True):
        assert_same(weights, by_hand[row["step"]])
        # Of the run's own weights: rounding decides few images, but a changed sign may some.
        clip = ClipWithAdapters(recipe.architecture, weights)
        scores = {
            alpha: accuracy_by_hand(clip, alpha, val, classes) for alpha in (0.0, 0.3, 0.6, 1.0)
        }
        metrics = {name: value for name, value in row.items() if name != "step"}
        assert metrics == pytest.approx(
            {"acc1@alpha=0.6": scores[0.6] / 100, "acc1@alpha=1": scores[1.0] / 100}, abs=1e-4
        ), row
    # The base may lie elsewhere by now.
    trained = load_adapter(out)
    gone = dataclasses.replace(trained.metadata, architecture="local-dir:gone")
    save_adapter(Adapter(trained.tensors, gone), tmp_path / "adapter.safetensors")
    models = from_adapter(tmp_path / "adapter.safetensors", list(scores), base=recipe.architecture)
    suite = own_validation(trained.metadata)
    validation = evaluate_suite(models, suite, Results(tmp_path / "results"), split="validation")
    choice = choose(validation, 0.6)
    models[0].close()
    assert {point.alpha: 100 * point.score for point in choice.curve} == pytest.approx(
        scores, abs=0.01
    )
    assert choice.best == min(
        alpha for alpha, score in scores.items() if score == max(scores.values())
    )


def test_validation_by_captions(recipe: Recipe, tmp_path: Path) -> None:
    data, pairs = captioned(tmp_path / "data", 16, seed=1)
    fields: dict[str, Any] = {"templates": "simple", "steps": 24, "weight_decay": 0.0}
    recipe = dataclasses.replace(
        recipe, task="retrieval", data=data, val_data=data, alpha=0.6, **fields
    )
    adapter = load_adapter(train(recipe))
    clip = ClipWithAdapters(recipe.architecture, adapter.tensors)
    expected = {}
    for alpha in (0.6, 1.0):
        for way, recall in zip(("image", "text"), recall_by_hand(clip, alpha, pairs), strict=True):
            expected[f"{way}_retrieval_recall@1@alpha={alpha:g}"] = recall / 100
    assert adapter.metadata.metrics == pytest.approx(expected, abs=1e-4)


def test_auto_takes_bf16_where_the_processor_computes_with_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = labelled(tmp_path / "data", 4, seed=0)
    recipe = dataclasses.replace(recipe, data=data, precision="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, avx512, precision in (
        (True, False, "bf16"),
        (False, True, "bf16"),
        (False, False, "no"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        learner = build(recipe, open_run(recipe), tmp_path)
        assert learner.plan.recipe.precision == learner.accelerator.mixed_precision == precision
