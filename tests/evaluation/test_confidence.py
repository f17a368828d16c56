"""Calibrated scores against torch's own optimizer, and on data whose temperature is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation import metrics
from radapter_serve.evaluation.metrics import (
    calibration_error,
    fit_confidence,
    fit_sigmoid,
    fit_temperature,
)

N = 4000
CLASSES = 6


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, CLASSES)).astype(np.float32) * 3


def drawn(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Labels that are right as often as softmax(logits / temperature) says."""
    shares = torch.softmax(torch.tensor(logits) / temperature, 1)
    return torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(1))[:, 0].numpy()


def least(loss: Callable[[torch.Tensor], torch.Tensor], start: list[float]) -> np.ndarray:
    """Where a function is least, by torch's L-BFGS."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-11, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach().numpy()


def test_the_temperature_is_the_best_for_whether_the_best_label_is_right(
    logits: np.ndarray,
) -> None:
    """Also where no temperature is right for all labels: here a third of them are drawn at
    random.
    """
    truth = np.where(np.arange(N) % 3, drawn(logits, 1.0), np.arange(N) // 3 % CLASSES)
    values = torch.tensor(logits, dtype=torch.float64)
    hits = torch.tensor(logits.argmax(axis=1) == truth, dtype=torch.float64)
    [inverse] = least(
        lambda point: binary_cross_entropy(torch.softmax(values * point, 1).amax(1), hits), [1.0]
    )
    assert fit_temperature(logits, truth) == pytest.approx(1 / inverse, rel=1e-4)


def test_the_sigmoid_is_that_of_a_logistic_regression(logits: np.ndarray) -> None:
    cosines = logits / 30 + 0.2
    truth = drawn(logits, 1.0)
    right = np.eye(CLASSES)[truth]
    positive = right.sum()
    negative = (1 - right).sum()
    target = torch.tensor(np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2)))
    values = 30 * (torch.tensor(cosines, dtype=torch.float64) - 0.2)
    expected = least(
        lambda line: binary_cross_entropy_with_logits(values * line[0] + line[1], target), [0, 0]
    )
    scale, bias = fit_sigmoid(cosines, truth)
    assert scale == pytest.approx(30 * expected[0], rel=1e-4)
    assert bias == pytest.approx(expected[1] - 6 * expected[0], rel=1e-4)


@pytest.mark.parametrize("fit", [fit_sigmoid, fit_temperature])
def test_many_pairs_are_fitted_by_some_images(
    logits: np.ndarray, fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = drawn(logits, 1.0)
    some, every = fit(logits[::2], truth[::2]), fit(logits, truth)
    monkeypatch.setattr(metrics, "MAX_PAIRS", N * CLASSES // 2)
    assert fit(logits, truth) == some != every


def test_each_half_is_judged_by_the_fit_of_the_other(logits: np.ndarray) -> None:
    """Every second image is much surer than the others, so that no half is right by the other's
    fit.
    """
    surer = np.arange(N) % 2 == 1
    factors: np.ndarray = np.where(surer, 1.0, 0.2).astype(np.float32)
    logits = logits * factors[:, None]
    truth = np.where(surer, drawn(logits, 3.0), drawn(logits, 0.3))
    after = torch.zeros(N, dtype=torch.float64)
    pairs = torch.zeros(N, CLASSES, dtype=torch.float64)
    for own, other in ((0, 1), (1, 0)):
        temperature = fit_temperature(logits[other::2], truth[other::2])
        assert temperature is not None
        values = torch.tensor(logits[own::2]).double()
        after[own::2] = torch.softmax(values / temperature, 1).amax(1)
        scale, bias = fit_sigmoid(logits[other::2] / 100, truth[other::2])
        pairs[own::2] = torch.sigmoid(values / 100 * scale + bias)
    hits = logits.argmax(1) == truth
    right = np.eye(CLASSES, dtype=bool)[truth]
    found = fit_confidence(logits / 100, truth, 100.0, None, "photos")
    assert (found.dataset, found.n, found.classes) == ("photos", N, CLASSES)
    assert found.temperature == pytest.approx(fit_temperature(logits, truth))
    plain = torch.softmax(torch.tensor(logits).double(), 1).amax(1)
    for error, sure, wanted in (
        (found.ece_before, plain, hits),
        (found.ece_after, after, hits),
        (found.label_ece, pairs, right),
    ):
        expected = calibration_error(sure.numpy().ravel(), wanted.ravel())
        assert error == pytest.approx(expected, abs=1e-3)


def test_the_least_score_keeps_95_of_100_images_and_says_what_else_reaches_it(
    logits: np.ndarray,
) -> None:
    cosines = logits[:1010] / 20
    truth = drawn(logits, 1.0)[:1010]
    found = fit_confidence(cosines, truth, 20.0, None, "photos")
    own = cosines[np.arange(1010), truth]
    assert found.min_score in own
    assert (own >= found.min_score).sum() == 960  # 95 % of 1,010 are 959.5
    others = np.where(np.arange(CLASSES) == truth[:, None], -np.inf, cosines)
    assert found.false_answers == (others >= found.min_score).any(axis=0).sum() / CLASSES


def test_models_without_a_temperature(logits: np.ndarray) -> None:
    biased = fit_confidence(logits / 100, drawn(logits, 1.0), 100.0, -9.0, "photos")
    assert biased.temperature is None and biased.ece_after is not None
    assert biased.ece_after < biased.ece_before
    # Where no image is wrong, the colder the better; where none is right, the warmer.
    right = fit_confidence(logits / 100, logits.argmax(axis=1), 100.0, None, "photos")
    assert right.temperature is None and right.ece_after is None and right.scale > 0
    assert fit_temperature(logits, logits.argmin(axis=1)) is None


@pytest.mark.parametrize("shape", [(99, 5), (200, 1)])
def test_too_few_images_or_labels(shape: tuple[int, int]) -> None:
    with pytest.raises(RAdapterError, match="too few for calibrated scores"):
        cosines = np.zeros(shape, np.float32)
        fit_confidence(cosines, np.zeros(shape[0], np.int64), 100.0, None, "photos")
