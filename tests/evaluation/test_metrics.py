"""Metrics against loops over sorted lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radapter_serve.evaluation.metrics import classification_metrics, retrieval_metrics, true_ranks


def best_first(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda column: (-scores[column], column))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_classification_against_a_loop(n: int, classes: int, seed: int, tied: bool) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, (n, classes)) if tied else generator.normal(size=(n, classes))
    scores = scores.astype(np.float32)
    labels = generator.integers(0, classes, n)
    found = classification_metrics(true_ranks(scores, labels), labels, classes)
    ordered = [best_first(row) for row in scores]
    assert found["acc1"] == pytest.approx(sum(o[0] == y for o, y in zip(ordered, labels, strict=True)) / n)
    if classes > 5:
        assert found["acc5"] == pytest.approx(sum(y in o[:5] for o, y in zip(ordered, labels, strict=True)) / n)
    else:
        assert "acc5" not in found
    recalls = []
    for label in set(labels.tolist()):
        own = [o[0] == label for o, y in zip(ordered, labels, strict=True) if y == label]
        recalls.append(sum(own) / len(own))
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / len(recalls))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(0, 2**32 - 1), st.booleans())
def test_retrieval_against_a_loop(captions: list[int], seed: int, tied: bool) -> None:
    generator = np.random.default_rng(seed)
    image_of = generator.permutation(np.repeat(np.arange(len(captions)), captions))
    width = 2 if tied else 8
    images, texts = (
        (generator.integers(0, 2, (n, width)) if tied else generator.normal(size=(n, width))).astype(np.float32)
        for n in (len(captions), len(image_of))
    )
    found = retrieval_metrics(images, texts, image_of)
    to_image = [best_first(row) for row in texts @ images.T]
    to_text = [best_first(row) for row in images @ texts.T]
    for k in (1, 5, 10):
        hits = [image_of[text] in ordered[:k] for text, ordered in enumerate(to_image)]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))
        hits = [any(image_of[text] == image for text in ordered[:k]) for image, ordered in enumerate(to_text)]
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))


def test_equal_scores_are_no_hits_for_all() -> None:
    same = np.ones((6, 4), np.float32)
    assert retrieval_metrics(same, same, np.arange(6))["image_retrieval_recall@1"] == pytest.approx(1 / 6)
