"""How far a graph is from torch: over all batches, wherever the worst row is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import SAMPLES, Agreement, Samples, Tolerance, compare

TURNS = (0.0, 0.3, 0.1)  # radians; of each batch's second row


def turned(angle: float) -> np.ndarray:
    """Two unit vectors; the second is turned by an angle."""
    return np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32)


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)], ids=["middle", "first", "last"]
)
def test_the_worst_batch_counts_wherever_it_is(order: tuple[int, ...]) -> None:
    inputs = [np.array([[number]], np.int32) for number in order]
    samples = Samples(inputs, [turned(0.0)] * len(order))

    def encoder(tokens: np.ndarray) -> np.ndarray:
        return turned(TURNS[tokens.item()])

    found = compare("a graph", encoder, samples, None)
    assert found.max_error == pytest.approx(np.sin(0.3), abs=1e-6)
    assert found.min_cosine == pytest.approx(np.cos(0.3), abs=1e-6)
    with pytest.raises(RAdapterError, match="a graph differs from torch by up to 2.96e-01"):
        compare("a graph", encoder, samples, 0.2)
    assert compare("a graph", encoder, samples, 0.3) == found


def test_what_is_just_as_far_as_allowed_is_near_enough() -> None:
    bounds = Tolerance(0.25, 0.5)
    assert Agreement(0.25, 0.5).within(bounds)
    assert not Agreement(0.3, 0.5).within(bounds)
    assert not Agreement(0.25, 0.4).within(bounds)


@pytest.mark.parametrize(
    "alphas", [(), (np.full((2, 1), 0.3, np.float32), np.ones((1, 1), np.float32))]
)
def test_samples_are_saved_and_loaded(alphas: tuple[np.ndarray, ...], tmp_path: Path) -> None:
    inputs = [np.array([[1, 2], [3, 4]], np.int32), np.array([[5, 6]], np.int32)]
    references = [turned(0.3), turned(0.1)[:1]]
    Samples(inputs, references, alphas).save(tmp_path)
    kinds = ("input", "reference", "alpha") if alphas else ("input", "reference")
    with np.load(tmp_path / SAMPLES) as file:
        assert set(file.files) == {f"{kind}_{number}" for kind in kinds for number in (0, 1)}
    found = Samples.load(tmp_path)
    for own, wanted in (
        (found.inputs, inputs),
        (found.references, references),
        (found.alphas, alphas),
    ):
        assert len(own) == len(wanted)
        for one, other in zip(own, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
