"""An export with validation data carries calibrated scores, and the tasks serve them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from radapter_export import ExportSettings, export_release
from radapter_export.accuracy import open_validation
from radapter_export.release import UNFITTED
from radapter_serve.adapter import Metadata, load_adapter
from radapter_serve.cli import export as command
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import load_release
from radapter_serve.model import Model
from radapter_serve.release.config import named_releases, read_config
from radapter_serve.training import train
from tests.export.conftest import CLASSES
from tests.helpers.short_run import short_run
from tests.helpers.small_models import make_base


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    return {"model_repository": tmp_path / "repository", "merged": tmp_path / "merged"}


def test_a_release_carries_what_its_validation_data_says(
    quick: None,
    adapter_path: Path,
    many_photos: Path,
    folders: dict[str, Any],
) -> None:
    data = f"imagefolder:{many_photos}"
    settings = ExportSettings(**folders, validation=data, max_drop=100)
    (release,) = export_release(adapter_path, [0.7], settings)
    fitted = release.facts["confidence"]
    assert (fitted["dataset"], fitted["n"], fitted["classes"]) == (data, 100, 5)
    folder = folders["model_repository"] / "classify"
    assert json.loads((folder / "1" / "release.json").read_text()) == release.facts
    assert named_releases(read_config(folder / "config.pbtxt"))[1].confidence == fitted

    local = load_release(str(folders["model_repository"]))
    classes = sorted(CLASSES)
    paths = sorted(many_photos.rglob("*.png"))
    prompts = [
        [template.replace("{}", name) for template in release.facts["templates"]]
        for name in classes
    ]
    means = np.stack([local.embed_texts(texts).mean(axis=0) for texts in prompts])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosines = torch.tensor(
        local.embed_pixels([local.pixels(path.read_bytes()) for path in paths]) @ means.T
    )
    truth = torch.tensor([classes.index(path.parent.name) for path in paths])
    right = torch.nn.functional.one_hot(truth, 5).double()
    target = torch.where(right > 0, 101 / 102, 1 / 402)
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(
            fitted["scale"] * cosines.double() + fitted["bias"] + shift, target
        ).item()
        for shift in (-0.05, 0.0, 0.05)
    ]
    assert losses[1] == min(losses)


def test_too_few_images_are_said(
    quick: None, adapter_path: Path, photos: Path, folders: dict[str, Any]
) -> None:
    settings = ExportSettings(**folders, validation=f"imagefolder:{photos}", max_drop=100)
    (release,) = export_release(adapter_path, [0.7], settings)
    assert release.accuracy is not None and "confidence" not in release.facts
    assert any(
        re.search("30 validation images of 5 labels are too few for calibrated", line)
        for line in release.warnings
    )


def test_the_runs_own_data_may_be_asked_for_in_fp32(adapter_path: Path, photos: Path) -> None:
    metadata = load_adapter(adapter_path).metadata
    metadata = Metadata(**{**vars(metadata), "recipe": {"val_data": f"imagefolder:{photos}"}})
    assert open_validation(metadata, None, None, "fp32", 0.5) is None
    found = open_validation(metadata, "own", None, "fp32", 0.5)
    assert found is not None and len(found.data) == 30


@pytest.mark.slow
def test_a_siglip_that_was_trained_finds_its_labels_by_what_was_fitted(
    quick: None, folders: dict[str, Any], tmp_path: Path
) -> None:
    """So does its own sigmoid, which training by the loss of the base does not leave behind."""
    random = np.random.default_rng(0)
    for number in range(204):
        path = (
            tmp_path
            / ("photos", "others")[number // 102]
            / CLASSES[number % 3]
            / f"{number:03}.png"
        )
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[..., number % 3] = 180
        Image.fromarray(pixels + random.integers(0, 60, pixels.shape, np.uint8)).save(path)
    data, others = (f"imagefolder:{tmp_path / name}" for name in ("photos", "others"))
    base = make_base("siglip", tmp_path / "base")
    run = train(short_run(base, tmp_path, data=data, batch_size=34, steps=90)).folder
    (exported,) = export_release(run, [1.0], ExportSettings(**folders, validation=others))
    release = exported.release
    assert exported.accuracy is not None and exported.accuracy.release > 90
    assert release.logit_bias is not None

    local = load_release(str(folders["model_repository"]))
    label_set = LabelSet.load(
        folders["model_repository"] / "classify" / "1" / "label_sets" / "classes.npz"
    )
    paths = sorted((tmp_path / "others").rglob("*.png"))
    cosines = (
        local.embed_pixels([local.pixels(path.read_bytes()) for path in paths]) @ label_set.embeds.T
    )
    right = np.array([label_set.labels.index(path.parent.name) for path in paths])
    own = 1 / (1 + np.exp(-(release.logit_scale * cosines + release.logit_bias)))
    assert (own[np.arange(102), right] >= 0.5).mean() > 0.6
    with Model(folders["model_repository"]) as model:
        found = model.classify(paths, label_set="classes", multi_label=True)
    shown = [label_set.labels[place] for place in right]
    assert np.mean([name in one.labels for name, one in zip(shown, found, strict=True)]) > 0.6
    assert np.mean([len(one.labels) for one in found]) < 1.2
    assert UNFITTED not in exported.warnings


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"temperature": 1.5, "ece_after": 0.01},
            "by temperature 1.500: ECE 20.00 % before, 1.00 % after",
        ),
        (
            {"temperature": 1.5, "ece_after": 0.21},
            "21.00 % after (worse, so do not ask for calibrated); --multi-label",
        ),
        (
            {"temperature": None, "ece_after": None},
            "ECE 20.00 %; no temperature can be fitted: every image was right",
        ),
    ],
)
def test_the_command_says_what_was_fitted(facts: dict[str, Any], words: str) -> None:
    least = {"min_score": 0.25, "false_answers": 0.4}
    said = command._calibrated({"ece_before": 0.2, "label_ece": 0.02, **least, **facts})
    assert words in said
    assert "--min-score calibrated (0.250) keeps 95% of the images, and answers 40% of" in said
