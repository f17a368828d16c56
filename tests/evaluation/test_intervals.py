"""Intervals against published values, exact binomials, and simulated repetitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radapter_serve.evaluation.metrics import (
    average_precisions,
    mean_recall_interval,
    paired_difference,
    precision_interval,
    segmentation_intervals,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "n", "expected"),
    [
        (0, 10, (0, 0.2775)),
        (5, 10, (0.2366, 0.7634)),
        (10, 10, (0.7225, 1)),
        (81, 263, (0.2553, 0.3662)),
    ],
)
def test_wilsons_interval_by_hand(hits: int, n: int, expected: tuple[float, float]) -> None:
    assert wilson(hits / n, n) == pytest.approx(
        expected, abs=5e-5
    )  # the last is Newcombe's (1998) example


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilsons_interval_holds_the_share(n: int, share: float) -> None:
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (7, 10), (10, 10)])
def test_a_mean_over_classes_of_one_image_each_is_a_share(hits: int, n: int) -> None:
    right = np.arange(n) < hits
    found = mean_recall_interval(right.astype(int), np.ones(n, int))
    assert found == pytest.approx(wilson(hits / n, n))


@pytest.mark.parametrize("skill", ["equal", "any", "high"])
@pytest.mark.parametrize(("classes", "images"), [(5, 2), (100, 1), (50, None)])
def test_a_mean_over_classes_is_covered_as_often_as_is_said(
    classes: int, images: int | None, skill: str
) -> None:
    """Simulated data sets, drawn from classes whose recall is known; None has 1 to 7 images in a
    class.
    """
    generator = np.random.default_rng(classes)
    covered = []
    for _ in range(1000):
        drawn = {
            "equal": np.full(classes, 0.8),
            "any": generator.random(classes),
            "high": generator.beta(18, 2, classes),
        }
        recall = drawn[skill]
        count = np.full(classes, images) if images else generator.integers(1, 8, classes)
        low, high = mean_recall_interval(generator.binomial(count, recall), count)
        covered.append(low <= recall.mean() <= high)
    assert np.mean(covered) > 0.93  # 95 % less three standard errors of a thousand
    if images != 1:
        assert np.mean(covered) < 0.985  # and not by an interval that holds everything


def test_images_are_drawn_for_segmentation() -> None:
    generator = np.random.default_rng(0)
    true = np.full((200, 2), 50)
    right = generator.binomial(true, 0.8)
    found = right + (true - right)[:, ::-1]  # what is not one class is the other
    sums = np.stack([right, true, found]).transpose(0, 1, 2)
    intervals = segmentation_intervals(sums)
    error = 1.96 * np.std(right.sum(1) / 100) / np.sqrt(200)
    mean = right.sum() / true.sum()
    assert intervals["pixel_accuracy"] == pytest.approx((mean - error, mean + error), abs=0.002)
    low, high = intervals["miou"]
    assert low < (right.sum(0) / (true + found - right).sum(0)).mean() < high and high - low < 0.05
    same = segmentation_intervals(np.repeat(sums[:, :1], 9, axis=1))
    assert all(high - low == pytest.approx(0) for low, high in same.values())
    assert segmentation_intervals(sums[:, :1]) == {}


def test_a_paired_difference_over_sets_is_a_bootstrap_of_images_within_each() -> None:
    generator = np.random.default_rng(0)
    easy = [generator.random(n) < 0.7 for n in (150, 600)]
    hard = [
        of & (generator.random(len(of)) < share) for of, share in zip(easy, (0.6, 0.9), strict=True)
    ]
    lead, half = paired_difference(easy, hard)
    means = []
    for _ in range(4000):
        rows = [generator.integers(0, len(of), len(of)) for of in easy]
        means.append(
            np.mean([a[r].mean() - b[r].mean() for a, b, r in zip(easy, hard, rows, strict=True)])
        )
    assert lead == pytest.approx(
        np.mean([a.mean() - b.mean() for a, b in zip(easy, hard, strict=True)])
    )
    assert (lead - half, lead + half) == pytest.approx(
        tuple(np.percentile(means, [2.5, 97.5])), abs=0.005
    )


def test_the_interval_of_a_mean_of_average_precisions_holds_the_truth() -> None:
    generator = np.random.default_rng(0)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        truth = generator.random((n, 3)) < [0.1, 0.3, 0.6]
        return (truth + generator.normal(size=(n, 3))).astype(np.float32), truth

    expected = average_precisions(*drawn(100_000)).mean()
    held = 0
    for _ in range(60):
        interval = precision_interval(*drawn(150))
        assert interval is not None
        held += interval[0] <= expected <= interval[1]
    assert held >= 52  # of 57 on average; fewer once in 100 sets of 60
    assert precision_interval(*drawn(1)) is None
