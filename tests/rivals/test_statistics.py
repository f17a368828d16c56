"""Intervals over images and seeds, against scipy's tests and by simulation; Holm's correction."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from rivals.statistics import corrected, holm, lead_of


def test_one_seed_is_a_t_test_over_images() -> None:
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=(1, 40), p=[0.1, 0.7, 0.2])
    lead = lead_of([values])
    test = scipy.stats.ttest_1samp(values[0], 0)
    low, high = test.confidence_interval()
    assert lead.p == pytest.approx(test.pvalue)
    assert (lead.points - lead.half, lead.points + lead.half) == pytest.approx(
        (100 * low, 100 * high)
    )


def test_two_sets_of_one_seed_are_welchs_test() -> None:
    draw = np.random.default_rng(2)
    first, second = draw.normal(0.1, 0.1, 12), draw.normal(0.1, 0.4, 30)
    # The mean of both is 0 where the first equals the second with the other sign.
    test = scipy.stats.ttest_ind(first, -second, equal_var=False)
    assert lead_of([first[None], second[None]]).p == pytest.approx(test.pvalue)


def test_where_images_are_alike_it_is_a_t_test_over_seeds() -> None:
    means = np.array([0.14, 0.155, 0.17])
    lead = lead_of([np.repeat(means[:, None], 100, axis=1)])
    test = scipy.stats.ttest_1samp(means, 0)
    assert lead.p == pytest.approx(test.pvalue)
    assert lead.p == pytest.approx(0.0031, abs=5e-5)
    assert lead.half == pytest.approx(100 * (test.confidence_interval().high - means.mean()))


def test_images_that_differ_add_their_variance() -> None:
    seeds = np.repeat(np.array([0.0, 0.1, 0.2, 0.3])[:, None], 50, axis=1)
    images = np.random.default_rng(0).normal(size=50) / 10
    of_seeds, of_images = scipy.stats.sem([0.0, 0.1, 0.2, 0.3]), scipy.stats.sem(images)
    for sets in (1, 2):
        lead = lead_of([seeds + images] * sets)
        variance = of_seeds**2 + of_images**2 / sets
        error = (100 * lead.points / 100) / scipy.stats.t.isf(lead.p / 2, 3)
        assert error == pytest.approx(100 * variance**0.5, rel=0.05)
        assert lead.half == pytest.approx(
            scipy.stats.t.isf(0.025, 3) * 100 * variance**0.5, rel=0.05
        )


def test_an_interval_covers_the_truth_in_95_of_100_cases() -> None:
    assert 0.94 <= coverage(seeds=3, of_seed=0.04, of_image=0.3, draws=2000) <= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("of_seed", [0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 1.0])
@pytest.mark.parametrize("of_image", [0.1, 0.3])
def test_it_covers_the_truth_whatever_varies(seeds: int, of_seed: float, of_image: float) -> None:
    assert 0.94 <= coverage(seeds, of_seed, of_image, draws=20_000) <= 0.96


def coverage(seeds: int, of_seed: float, of_image: float, draws: int) -> float:
    """Share of draws of two sets in whose interval the true lead is; deviations are of the effect
    of a seed, and of those of an image and of its noise.
    """
    draw = np.random.default_rng(seeds)
    hits = 0
    for _ in range(draws):
        effects = draw.normal(scale=of_seed, size=(seeds, 1))
        sets: list[NDArray[np.float64]] = []
        for images in (50, 80):
            same = draw.normal(scale=of_image, size=images)
            sets.append(0.1 + effects + same + draw.normal(scale=of_image, size=(seeds, images)))
        lead = lead_of(sets)
        hits += abs(lead.points - 10) <= lead.half
    return hits / draws


def test_the_same_images_in_two_sets_are_one_sample() -> None:
    draw = np.random.default_rng(3)
    values = draw.normal(size=60) + draw.normal(scale=0.3, size=(3, 60))
    names = np.arange(60)
    single = lead_of([values])
    both = lead_of([values, values], [names, names])
    assert (both.points, both.half, both.p) == pytest.approx((single.points, single.half, single.p))
    assert lead_of([values, values]).half < single.half
    # Half of the images are in both: their weight is that of two.
    part = lead_of([values, values[:, :30]], [names, names[:30]])
    assert part.half > lead_of([values, values[:, :30]]).half


def test_leads_that_nothing_tells_apart() -> None:
    none = lead_of([np.zeros((2, 5))])
    assert (none.points, none.half, none.p) == (0.0, 0.0, 1.0)
    single = lead_of([np.array([[1.0], [1.0], [0.0]])])
    assert single.points == pytest.approx(66.7, abs=0.05)
    assert isnan(single.half) and isnan(single.p) and str(single) == "+66.7"
    assert corrected({"single": single}) == {"single": "+66.7"}


def test_holm_by_hand() -> None:
    # 0.005 <= 0.05/4 and 0.01 <= 0.05/3, but 0.03 > 0.05/2, which ends it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04]) == [True]
    assert holm([nan, 0.5]) == [False, False]
    assert holm([nan, 0.04]) == [False, True]


def test_a_claim_counts_once() -> None:
    draw = np.random.default_rng(4)
    values = scipy.stats.zscore(draw.normal(size=30), ddof=1)
    clear = (values + scipy.stats.t.isf(0.01, 29) / 30**0.5)[None]
    leads = {"clear": lead_of([clear]), "other": lead_of([values[None]])}
    assert leads["clear"].p == pytest.approx(0.02)
    assert corrected(leads)["clear"].startswith("**+")
    # A copied row and the lead seen from the other system change nothing.
    leads |= {"copy": lead_of([clear.copy()]), "mirrored": lead_of([-clear])}
    assert corrected(leads)["clear"].startswith("**+")
    assert corrected(leads)["mirrored"].startswith("**-")
    leads["third"] = lead_of([draw.normal(0.0, 1.0, size=(1, 30))])
    assert not corrected(leads)["clear"].startswith("**")
