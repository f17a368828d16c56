"""An export with validation data carries calibrated scores, and the tasks serve them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radapter_export.accuracy import open_validation
from radapter_export.release import UNFITTED
from radapter_serve.adapter import Metadata, load_adapter
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import load_release
from radapter_serve.model import Model
from radapter_serve.release.config import named_releases, read_config
from radapter_serve.training import train
from tests.export.conftest import CLASSES, Export
from tests.helpers.short_run import short_run
from tests.helpers.small_models import make_base


def test_a_release_carries_what_its_validation_data_says(
    export: Export, many_photos: Path, tmp_path: Path
) -> None:
    data = f"imagefolder:{many_photos}"
    (release,) = export([0.7], validation=data, max_drop=100)
    fitted = release.facts["confidence"]
    assert (fitted["dataset"], fitted["n"], fitted["classes"]) == (data, 100, 5)
    folder = tmp_path / "repository" / "classify"
    assert json.loads((folder / "1" / "release.json").read_text()) == release.facts
    assert named_releases(read_config(folder / "config.pbtxt"))[1].confidence == fitted

    # No other bias has a smaller loss, with Platt's targets, than the one that was fitted.
    local = load_release(tmp_path / "repository")
    classes = sorted(CLASSES)
    paths = sorted(many_photos.rglob("*.png"))
    means = []
    for name in classes:
        prompts = [template.replace("{}", name) for template in release.facts["templates"]]
        means.append(local.embed_texts(prompts).mean(axis=0))
    texts = np.stack(means) / np.linalg.norm(means, axis=1, keepdims=True)
    images = local.embed_pixels([local.pixels(path.read_bytes()) for path in paths])
    cosines = torch.tensor(images @ texts.T).double()
    truth = torch.tensor([classes.index(path.parent.name) for path in paths])
    right = torch.nn.functional.one_hot(truth, 5).bool()
    target = torch.where(right, 101 / 102, 1 / 402).double()
    losses = []
    for shift in (-0.05, 0.0, 0.05):
        logits = fitted["scale"] * cosines + fitted["bias"] + shift
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        losses.append(loss.item())
    assert losses[1] == min(losses)


def test_too_few_images_give_a_warning(export: Export, photos: Path) -> None:
    (release,) = export([0.7], validation=f"imagefolder:{photos}", max_drop=100)
    assert release.accuracy is not None and "confidence" not in release.facts
    [warning] = release.warnings
    assert "30 validation images of 5 labels are too few for calibrated" in warning


def test_the_runs_own_data_may_be_asked_for_in_fp32(adapter_path: Path, photos: Path) -> None:
    metadata = load_adapter(adapter_path).metadata
    metadata = Metadata(**{**vars(metadata), "recipe": {"val_data": f"imagefolder:{photos}"}})
    assert open_validation(metadata, None, None, "fp32") is None
    validation = open_validation(metadata, "own", None, "fp32")
    assert validation is not None and len(validation) == 30


@pytest.mark.slow
def test_a_siglip_that_was_trained_finds_its_labels_by_what_was_fitted(
    export: Export, tmp_path: Path
) -> None:
    """So does its own sigmoid, which training by the loss of the base does not leave behind."""
    random = np.random.default_rng(0)
    for number in range(204):
        split = ("photos", "others")[number // 102]
        path = tmp_path / split / CLASSES[number % 3] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[..., number % 3] = 180
        Image.fromarray(pixels + random.integers(0, 60, pixels.shape, np.uint8)).save(path)
    data, others = (f"imagefolder:{tmp_path / name}" for name in ("photos", "others"))
    base = make_base("siglip", tmp_path / "base")
    run = train(short_run(base, tmp_path, data=data, batch_size=34, steps=90)).folder
    (exported,) = export([1.0], adapter=run, validation=others)
    release = exported.release
    assert exported.accuracy is not None and exported.accuracy.release > 90
    assert release.logit_bias is not None and UNFITTED not in exported.warnings

    repository = tmp_path / "repository"
    local = load_release(repository)
    label_set = LabelSet.load(repository / "classify" / "1" / "label_sets" / "classes.npz")
    paths = sorted((tmp_path / "others").rglob("*.png"))
    images = local.embed_pixels([local.pixels(path.read_bytes()) for path in paths])
    right = np.array([label_set.labels.index(path.parent.name) for path in paths])
    logits = release.logit_scale * (images @ label_set.embeds.T) + release.logit_bias
    probabilities = 1 / (1 + np.exp(-logits))
    assert (probabilities[np.arange(102), right] >= 0.5).mean() > 0.6
    with Model(repository) as model:
        answers = model.classify(paths, label_set="classes", multi_label=True)
    pairs = zip(paths, answers, strict=True)
    assert np.mean([path.parent.name in answer.labels for path, answer in pairs]) > 0.6
    assert np.mean([len(answer.labels) for answer in answers]) < 1.2
