"""The rates of a least score, against loops."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.parametrize("least", [-1.0, 0.2, 0.7])
def test_the_rates_are_those_of_loops(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("least_score")
    random = np.random.default_rng(0)
    cosines = random.uniform(-1, 1, (6, 20)).astype(np.float32)
    truth = random.integers(0, 5, 20)  # nothing is of the last class, which therefore does not ask
    own = []
    wrong = []
    kept = []
    false = []
    for label in range(5):
        right = [bool(cosines[label, n] >= least) for n in range(20) if truth[n] == label]
        others = [bool(cosines[label, n] >= least) for n in range(20) if truth[n] != label]
        own += right
        wrong += others
        kept.append(any(right))
        false.append(any(others))
    assert script.rates(cosines, truth, least) == script.Rates(
        images=pytest.approx(np.mean(own)),
        queries=np.mean(kept),
        wrong=pytest.approx(1 - np.mean(wrong)),
        false_answers=np.mean(false),
    )
