"""Small data sets, an adapter with random values for the tiny CLIP, and a suite of both tasks."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate
from tests.helpers.own_cache import own_cache as own_cache
from tests.helpers.small_models import release

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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `shifted` with 4 images a class, `captions.csv` with 1 to 3 captions for each of
    12, `suite.yaml`.
    """
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


class Fake:
    """An encoder and a tokenizer of words: an image is seen by `see`, a text is the direction of
    its place in `names`.
    """

    def __init__(self, names: Sequence[str], see: Callable[..., Floats]) -> None:
        self.names = list(names)
        self.see = see

    def images(self, pixels: NDArray[np.uint8], alpha: object = None) -> Floats:
        return self.see(pixels, dense=False)

    def patches(self, pixels: NDArray[np.uint8], alpha: object = None) -> Floats:
        return self.see(pixels, dense=True)

    def tokens(self, tokens: NDArray[np.int32], alpha: object = None) -> Floats:
        return np.eye(len(self.names), dtype=np.float32)[tokens[:, 0]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.names.index(text)] for text in texts]

    def batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        return np.array(rows, np.int32)

    def close(self) -> None:
        pass


def candidate(fake: Fake, size: int, **facts: Any) -> Candidate:
    """A model by a fake, whose prompts are the names alone; `facts` are those of a release."""
    preprocess = {"size": [size, size], "interpolation": "bilinear"}
    fields = {"templates": ["{}"], "preprocess": preprocess, **facts}
    loaded = LoadedRelease(release(3, **fields), fake, fake)  # type: ignore[arg-type]
    return Candidate("oracle", None, {}, loaded)
