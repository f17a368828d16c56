"""The alignment of two frozen towers by captions, and how many captions find their photo."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import real_features

PHOTOS = 80
CAPTIONS = 2


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """Features of photos and captions that show the same things in other directions."""
    monkeypatch.setattr(real_features, "BATCH", 32)
    draw = np.random.default_rng(0)
    things = draw.normal(size=(PHOTOS, 6))
    photos = things @ draw.normal(size=(6, 40)) + 3
    words = np.repeat(things, CAPTIONS, axis=0) @ draw.normal(size=(6, 30))
    captions = [["a photo"] * CAPTIONS for _ in range(PHOTOS)]
    return photos.astype(np.float32), words.astype(np.float32), captions


def share(pairs: tuple[np.ndarray, np.ndarray, list[list[str]]], maps: list[torch.Tensor]) -> float:
    photos = pairs[0] @ maps[0].numpy().T
    photos /= np.linalg.norm(photos, axis=1, keepdims=True)
    return real_features.recall(photos, pairs[1] @ maps[1].numpy().T, pairs[2])


def test_captions_find_their_photos(pairs):
    untrained = [torch.randn(8, 40), torch.randn(8, 30)]
    assert share(pairs, untrained) < 0.3  # by chance 5 of 80
    assert share(pairs, real_features.align(*pairs, seed=0)) > 0.8


def test_a_seed_names_a_model(pairs):
    first, again, other = (real_features.align(*pairs, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_recall_counts_the_captions_whose_photo_is_among_the_nearest():
    photos = np.eye(3, dtype=np.float32)
    words = np.array([[1, 0, 0], [0.2, 0.9, 0.1], [0.9, 0.1, 0.5]], np.float32)
    captions = [["a"], ["b"], ["c"]]
    assert real_features.recall(photos, words, captions, top=1) == pytest.approx(2 / 3)
    assert real_features.recall(photos, words, captions, top=2) == 1
