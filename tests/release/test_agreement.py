"""The distance of a graph from torch: over all batches, wherever the worst row is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import TOLERANCES, Agreement, Samples, Tolerance, compare

TURNS = (0.0, 0.3, 0.1)  # radians; of each batch's second row


def turned(angle: float) -> np.ndarray:
    """Two unit vectors; the second is turned by an angle."""
    return np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_the_worst_batch_counts_wherever_it_is(order: tuple[int, ...]) -> None:
    inputs = [np.array([[number]], np.int32) for number in order]
    samples = Samples(inputs, [turned(0.0)] * len(order))

    def encoder(tokens: np.ndarray) -> np.ndarray:
        return turned(TURNS[tokens.item()])

    agreement = compare("a graph", encoder, samples, Tolerance(0.3))
    assert agreement.max_error == pytest.approx(np.sin(0.3), abs=1e-6)
    assert agreement.min_cosine == pytest.approx(np.cos(0.3), abs=1e-6)
    with pytest.raises(RAdapterError, match="a graph differs from torch by up to 2.96e-01"):
        compare("a graph", encoder, samples, Tolerance(0.2))


def agreement_of(embeds: np.ndarray, reference: np.ndarray, bounds: Tolerance) -> Agreement:
    samples = Samples([np.zeros((len(reference), 1), np.uint8)], [reference.astype(np.float32)])
    return compare("graph", lambda values: embeds.astype(np.float32), samples, bounds)


def units(seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(4, 512))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_other_directions_never_pass_whatever_the_tolerance(precision: str) -> None:
    zero = units(0)
    zero[2] = 0
    assert np.abs(units(0) - units(1)).max() < 0.3  # by components alone, they are near
    for tolerance in (1e-4, 0.3, 1.0):
        bounds = TOLERANCES[precision].widened(tolerance)
        for embeds in (zero, units(1)):
            with pytest.raises(RAdapterError, match=r"no --tolerance allows a cosine below 0\.9"):
                agreement_of(embeds, units(0), bounds)


def test_tolerance_widens_the_cosine_by_its_square_and_the_advice_suffices() -> None:
    bounds = TOLERANCES["fp32"]
    assert bounds.widened(1e-4) == bounds
    assert bounds.widened(1e-6).min_cosine == bounds.min_cosine
    assert 1 - bounds.widened(1e-3).min_cosine == pytest.approx(100 * (1 - bounds.min_cosine))
    assert bounds.widened(1.0).min_cosine == 0.9
    noise = np.random.default_rng(2).normal(size=(4, 512))
    # The signs have errors of one size, so that the cosine is what needs the larger tolerance.
    for away in (3e-4 * noise, 3e-3 * noise, 1e-2 * noise, 2.6e-4 * np.sign(noise)):
        near = units(0) + away
        with pytest.raises(RAdapterError, match="to accept this, export with --tolerance") as error:
            agreement_of(near, units(0), bounds)
        advice = float(str(error.value).rpartition(" ")[2])
        assert agreement_of(near, units(0), bounds.widened(advice)).max_error <= advice
        with pytest.raises(RAdapterError, match="differs from torch"):  # nor is it far too much
            agreement_of(near, units(0), bounds.widened(advice / 2.01))


NAN = units(0) * np.where(np.arange(512) == 7, np.nan, 1)


@pytest.mark.parametrize(
    ("embeds", "message"), [(NAN, "not finite"), (units(0)[:, :8], r"gives \(4, 8\) where torch")]
)
def test_embeddings_that_are_none_are_refused(embeds: np.ndarray, message: str) -> None:
    with pytest.raises(RAdapterError, match=message):
        agreement_of(embeds, units(0), Tolerance(1.0))


def test_a_graph_that_fails_on_a_batch_is_named() -> None:
    samples = Samples([np.zeros((4, 1), np.uint8)], [units(0).astype(np.float32)])
    with pytest.raises(RAdapterError, match=r"graph fails on a batch of shape \(4, 1\): "):
        compare("graph", lambda values: values["x"], samples, Tolerance(1.0))


@pytest.mark.parametrize(
    "alphas", [(), (np.full((2, 1), 0.3, np.float32), np.ones((1, 1), np.float32))]
)
def test_samples_are_saved_and_loaded(alphas: tuple[np.ndarray, ...], tmp_path: Path) -> None:
    inputs = [np.array([[1, 2], [3, 4]], np.int32), np.array([[5, 6]], np.int32)]
    samples = Samples(inputs, [turned(0.3), turned(0.1)[:1]], alphas)
    samples.save(tmp_path)
    loaded = Samples.load(tmp_path)
    for name in ("inputs", "references", "alphas"):
        pairs = zip(getattr(loaded, name), getattr(samples, name), strict=True)
        for batch, expected in pairs:
            np.testing.assert_array_equal(batch, expected)
    with pytest.raises(RAdapterError, match=r"samples.npz.*radapter-export"):
        Samples.load(tmp_path / "none")


def test_the_worst_of_several_agreements_has_the_largest_distances() -> None:
    worst = Agreement.worst(Agreement(1e-5, 0.9), Agreement(1e-4, 0.99))
    assert worst == Agreement(1e-4, 0.9)
