"""Intervals of 95 %: how far off a figure may be because other images of the same kind could have
been drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.evaluation.metrics import average_precisions, mean_metrics

Interval = tuple[float, float]

_Z = 1.959964  # of the normal distribution, 95 % within
_DRAWS = 1000  # of the bootstrap
_BLOCK = 100  # draws in memory at once
_FEWER_DRAWS = 200  # where each takes long
_PRECISION_BLOCK = 20
_MAX_SCORES = 5_000_000  # of an image and a class


def wilson(share: float, n: float) -> Interval:
    """Wilson's interval of a share of n independent cases; n is not whole where cases of different
    weight count as so many equal ones.
    """
    middle = share + _Z**2 / (2 * n)
    spread = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = ((middle + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def mean_recall_interval(hits: NDArray[Any], count: NDArray[Any]) -> Interval:
    """The interval of a mean over classes, from right images and images of each, integer [C]:
    Wilson's, of as many images as tell as much as these.

    The variance within a class of n images is n/(n - 1) times that of its answers, which is
    unbiased. A single image tells no variance: it counts as if its class were like all classes
    together, which is more than the truth where classes differ. The mean variance has as many
    degrees of freedom as images beyond the first of their class, and one more of the variance of
    all classes together, so that it is not 0 by chance where there are few.
    """
    recall = hits / count
    mean = float(recall.mean())
    scale = float((1 / count).sum())
    together = mean * (1 - mean)
    if together == 0:
        return wilson(mean, len(count) ** 2 / scale)
    several = count > 1
    within = np.full(len(count), together)
    within[several] = (recall * (1 - recall))[several] * count[several] / (count[several] - 1)
    freedom = int((count - 1).sum())
    variance = (freedom * float((within / count).sum()) + together * scale) / (freedom + 1)
    return wilson(mean, len(count) ** 2 * together / variance)


def precision_interval(scores: NDArray[Any], truth: NDArray[np.bool_]) -> Interval | None:
    """The interval of the mean of `average_precisions`: a normal one, whose spread is that of a
    bootstrap over images; None for a single image and for too many scores to draw from.

    The draws' own mean is too high, for copies of an image rank together.
    """
    n = len(scores)
    if n < 2 or scores.size > _MAX_SCORES:
        return None
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_FEWER_DRAWS // _PRECISION_BLOCK):
        times = generator.multinomial(n, np.full(n, 1 / n), _PRECISION_BLOCK)
        means.append(np.nanmean(average_precisions(scores, truth, times), axis=1))
    mean = float(np.nanmean(average_precisions(scores, truth)))
    spread = _Z * float(np.concatenate(means).std(ddof=1))
    return max(0.0, mean - spread), min(1.0, mean + spread)


def paired_difference(
    first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]
) -> tuple[float, float]:
    """How much better one system is than another on the same cases: the mean over data sets of the
    mean differences, and the half-width of its normal interval of 95 %; from both systems' results
    of each case, such as right or wrong, [N] for each data set, with N of 2 or more.
    """
    differences = [
        np.asarray(a, float) - np.asarray(b, float) for a, b in zip(first, second, strict=True)
    ]
    variance = sum(float(of.var(ddof=1)) / len(of) for of in differences) / len(differences) ** 2
    return float(np.mean([of.mean() for of in differences])), _Z * sqrt(variance)


def segmentation_intervals(sums: NDArray[Any]) -> dict[str, Interval]:
    """The intervals of `segmentation_metrics` by a bootstrap over images, from `pixel_sums` of
    each, [3, N, C]; empty for a single image, which says nothing about others.
    """
    _, n, classes = sums.shape
    if n < 2:
        return {}
    generator = np.random.default_rng(0)
    flat = np.moveaxis(sums, 1, 0).reshape(n, -1).astype(float)
    parts = []
    for _ in range(_DRAWS // _BLOCK):
        times = generator.multinomial(n, np.full(n, 1 / n), _BLOCK)
        drawn = (times @ flat).reshape(_BLOCK, 3, classes)
        parts.append(mean_metrics(np.moveaxis(drawn, 0, 1)))
    intervals = {}
    for name in parts[0]:
        low, high = np.percentile(np.concatenate([part[name] for part in parts]), [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals
