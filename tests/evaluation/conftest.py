"""Small data sets, an adapter with random values for the tiny CLIP, and a suite of both tasks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radapter_serve.adapter import Adapter, save_adapter

CLASSES = ["cat", "dog", "guitar", "horse", "house", "tree"]
SUITE = """
name: small
templates: ["a photo of a {}.", "a drawing of the {}"]
sets:
  - {name: plain, data: "imagefolder:plain"}
  - {name: shifted, data: "imagefolder:shifted", shift: ood, classes: names.yaml}
  - {name: captioned, data: "csv:captions.csv", task: retrieval, templates: null}
  - {name: held-out, data: "imagefolder:plain", split: validation}
  - {name: held-out-shift, data: "imagefolder:shifted", split: validation, shift: ood}
"""


def picture(generator: np.random.Generator) -> Image.Image:
    pixels = generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((50, 41), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def few_nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time that the texts of 333 common nouns take."""
    monkeypatch.setattr("radapter_serve.evaluation.image_sets._NOUN_STEP", 30)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 24 images, 12 images with 1 to 3 captions, and a suite of them."""
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    for name in ("plain", "shifted"):
        for index in range(4 * len(CLASSES)):
            folder = root / name / CLASSES[index % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            picture(generator).save(folder / f"{index}.png")
    (root / "images").mkdir()
    rows = []
    for index in range(12):
        picture(generator).save(root / "images" / f"{index}.jpg")
        rows += [
            [f"images/{index}.jpg", f"picture {index}, said in way {way}"]
            for way in range(1 + index % 3)
        ]
    generator.shuffle(rows)
    with (root / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    (root / "names.yaml").write_text(
        "cat: cat, kitty\nhouse: a house\ntree: tree\nunknown: x\n", encoding="utf-8"
    )
    (root / "suite.yaml").write_text(SUITE, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def run_folder(
    random_adapter: Callable[..., Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with an adapter of random values."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    save_adapter(random_adapter(alpha=0.5), run / "adapter.safetensors")
    return run
