"""Fitting of calibrated scores: one temperature for the softmax over labels, and a sigmoid for
labels on their own.

Temperature scaling is Guo et al.'s (ICML 2017), fitted to the best label alone as Le Coz et al.
(NeurIPS 2024) do; the sigmoid is Platt's (1999), on all pairs of an image and a label.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit

from radapter_serve.contract.labels import class_probabilities
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import Floats, calibration_error, calibration_sums
from radapter_serve.release.release import KEPT, Confidence

LEAST = 100  # images
MAX_PAIRS = 4_000_000  # of an image and a label, by which is fitted
RANGE = (0.01, 100.0)  # of temperatures

Doubles = NDArray[np.float64]


def fit_confidence(
    cosines: Floats,
    truth: NDArray[np.int64],
    logit_scale: float,
    logit_bias: float | None,
    dataset: str,
) -> Confidence:
    """Fit what makes a release's scores calibrated, from the cosines of images with labels, [N, C],
    and the right label of each, [N].
    """
    n, classes = cosines.shape
    if n < LEAST or classes < 2:
        raise RAdapterError(
            f"{n} validation images of {classes} labels are too few for calibrated scores; {LEAST}"
            " images are needed, and two labels"
        )
    scale, bias = fit_sigmoid(cosines, truth)
    temperature = None if logit_bias is not None else fit_temperature(cosines * logit_scale, truth)
    plain = class_probabilities(cosines, logit_scale, logit_bias)
    best = cosines.argmax(axis=1)

    # Scores of each half of the images by a fit to the other half.
    halves = [np.arange(n) % 2 == number for number in (0, 1)]
    after = np.full(n, np.nan, np.float32)
    pairs = np.empty_like(plain)
    for half, other in zip(halves, reversed(halves), strict=True):
        pairs[half] = class_probabilities(cosines[half], *fit_sigmoid(cosines[other], truth[other]))
        if logit_bias is not None:
            after[half] = pairs[half, best[half]]
        elif temperature is not None:
            own = fit_temperature(cosines[other] * logit_scale, truth[other]) or temperature
            after[half] = class_probabilities(cosines[half], logit_scale / own)[
                np.arange(half.sum()), best[half]
            ]

    hits = best == truth
    right = np.arange(classes) == truth[:, None]
    known = not np.isnan(after).any()
    # The highest cosine that at least `KEPT` of the images have with their own label.
    own_scores = np.sort(cosines[np.arange(n), truth])
    min_score = float(own_scores[int((1 - KEPT) * n + 1e-9)])
    others = np.where(right, -np.inf, cosines)
    return Confidence(
        scale=scale,
        bias=bias,
        dataset=dataset,
        n=n,
        classes=classes,
        ece_before=_error(plain[np.arange(n), best], hits),
        label_ece=_error(pairs.ravel(), right.ravel()),
        temperature=temperature,
        ece_after=_error(after, hits) if known else None,
        min_score=min_score,
        false_answers=float((others.max(axis=0) >= min_score).mean()),
    )


def fit_temperature(
    logits: Floats, truth: NDArray[np.int64], *, max_pairs: int = MAX_PAIRS
) -> float | None:
    """The temperature at which the highest score p predicts best whether its label is right.

    The mean of -log p where it is right, and of -log(1 - p) where it is wrong, is least there. The
    likelihood of the right label, which Guo et al. take, is ruled by the images that are wrong
    where there are many labels: it makes the best label's score too low.

    None where there is no such temperature within `RANGE`: no image is wrong, or the scores do not
    tell right from wrong. Of more than `max_pairs` of an image and a label, every k-th image
    counts.
    """
    logits, truth = _some(logits, truth, max_pairs)
    logits = np.array(logits, np.float64)
    rows = np.arange(len(logits))
    best = logits.argmax(axis=1)
    right = best == truth
    if right.all():
        return None
    signs = np.where(right, -1.0, 1.0)
    logits -= logits[rows, best][:, None]
    logits[rows, best] = -np.inf
    # The other logits are compared with the highest of them, so that none is too small.
    second = logits.max(axis=1)
    logits -= second[:, None]

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        # Of the best label against all others.
        log_odds = -inverse * second - np.log(np.exp(inverse * logits).sum(axis=1))
        return float(np.logaddexp(0, signs * log_odds).mean())

    ends = np.log(RANGE)
    best_log = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-6}).x
    return float(np.exp(best_log)) if np.abs(ends - best_log).min() > 1e-4 else None


def fit_sigmoid(
    cosines: Floats, truth: NDArray[np.int64], *, max_pairs: int = MAX_PAIRS
) -> tuple[float, float]:
    """Scale and bias at which sigmoid(scale x cosine + bias) says best which label is right."""
    cosines, truth = _some(cosines, truth, max_pairs)
    right = (np.arange(cosines.shape[1]) == truth[:, None]).ravel()
    count = right.sum()
    others = len(right) - count
    # Platt's targets: as if there were one more of both, so that there is an answer where all
    # cosines tell all apart.
    target = np.where(right, (count + 1) / (count + 2), 1 / (others + 2))
    values = np.asarray(cosines, np.float64).ravel()
    mean = values.mean()
    spread = max(float(values.std()), 1e-12)
    values = (values - mean) / spread

    def loss(line: Doubles) -> tuple[float, Doubles]:
        """The mean cross-entropy, and its gradient."""
        logits = line[0] * values + line[1]
        error = expit(logits) - target
        gradient = np.array([(error * values).mean(), error.mean()])
        return float((np.logaddexp(0, logits) - target * logits).mean()), gradient

    start = np.array([0.0, np.log((count + 1) / (others + 1))])
    slope, shift = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(slope / spread), float(shift - slope * mean / spread)


def _some(
    values: Floats, truth: NDArray[np.int64], max_pairs: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Every k-th image, where all have too many pairs."""
    step = -(-values.size // max_pairs)
    return values[::step], truth[::step]


def _error(confidences: Floats, hits: NDArray[np.bool_]) -> float:
    return calibration_error(calibration_sums(confidences, hits))
