"""Probabilities of labels against torch, and labels that are alike."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.contract.labels import best_class, class_probabilities, indistinguishable


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 200), st.none() | st.floats(-20, 20))
def test_a_softmax_or_with_a_bias_a_sigmoid_as_torch_has_them(
    seed: int, scale: float, bias: float | None
) -> None:
    cosines = np.random.default_rng(seed).uniform(-1, 1, (2, 3, 5)).astype(np.float32)
    before = cosines.copy()
    logits = scale * torch.from_numpy(before).double()
    expected = logits.softmax(-1) if bias is None else (logits + bias).sigmoid()
    np.testing.assert_allclose(
        class_probabilities(cosines, scale, bias), expected, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(cosines, before)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 50),
    st.floats(0.1, 200),
    st.none() | st.floats(-20, 20),
)
def test_the_best_label_is_the_first_of_equal_ones_with_its_probability(
    seed: int, labels: int, places: int, scale: float, bias: float | None
) -> None:
    # So coarse that many are equal.
    coarse = np.random.default_rng(seed).integers(-4, 5, (labels, places))
    cosines = (coarse / 4).astype(np.float32)
    logits = scale * torch.from_numpy(cosines).double()
    expected = logits.softmax(0) if bias is None else (logits + bias).sigmoid()
    first = [column.index(max(column)) for column in coarse.T.tolist()]
    best, probabilities = best_class(cosines.copy(), scale, bias)
    assert best.tolist() == first
    np.testing.assert_allclose(
        probabilities, expected.numpy()[first, range(places)], rtol=1e-4, atol=1e-6
    )


def test_labels_that_are_alike_are_named_once() -> None:
    embeds = np.array([[1, 0], [0, 1], [1, 0], [1, 0.005], [1, 0.1], [0, 1]], np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    assert indistinguishable(list("abcdef"), embeds) == [("a", "c"), ("a", "d"), ("b", "f")]
    assert indistinguishable(["a"], embeds[:1]) == indistinguishable([], embeds[:0]) == []


def test_many_labels_are_compared_across_blocks() -> None:
    generator = np.random.default_rng(0)
    embeds = generator.normal(size=(3000, 16)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    embeds[2999] = embeds[5]
    assert indistinguishable([str(n) for n in range(3000)], embeds) == [("5", "2999")]
