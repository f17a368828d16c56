"""Metrics, their 95 % confidence intervals (over the draw of images), and the fit of calibrated
scores: a temperature for the softmax over labels, and a sigmoid for each label alone.

Temperature scaling is Guo et al.'s (ICML 2017), fitted to the best label alone as in Le Coz et al.
(NeurIPS 2024); the sigmoid is Platt's (1999), fitted to all pairs of an image and a label.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.labels import class_probabilities
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import MIN_SCORE_SHARE, Confidence

Floats = NDArray[np.float32]
Ranks = NDArray[np.int64]
Interval = tuple[float, float]
# Equally wide bins of confidence for the calibration error, as in Guo et al. (ICML 2017).
BINS = 15
_BLOCK = 1024  # rows of similarities in memory at once
_Z = 1.959964  # 95 % of a normal distribution lies within this many standard deviations
_DRAWS = 1000  # of a bootstrap
_DRAWN = 100  # draws in memory at once
_FEWER_DRAWS = 200  # of the bootstrap of mAP, which is slow
_PRECISION_BLOCK = 20  # of these draws in memory at once
_MAX_SCORES = 5_000_000  # images x classes; above, mAP has no interval
MIN_IMAGES = 100  # fewest images for the fit of calibrated scores
MAX_PAIRS = 4_000_000  # most pairs of an image and a label in a fit
TEMPERATURES = (0.01, 100.0)  # ends of the range of the fit


def check_finite(values: Floats) -> Floats:
    """Return `values`; an error if some are not finite and can't be ranked."""
    if not np.isfinite(values).all():
        raise RAdapterError(
            "the embeddings hold values that are not finite (NaN or infinite); the weights or the"
            " adapter are broken"
        )
    return values


def true_ranks(scores: Floats, truth: NDArray[Any]) -> Ranks:
    """Rank of the right column in each row, from 0, int64 [N]; ties by column. `scores` are [N, C],
    `truth` integer [N].
    """
    check_finite(scores)
    right = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    return np.asarray(((scores > right) | ((scores == right) & earlier)).sum(axis=1), np.int64)


def classification_metrics(ranks: Ranks, labels: NDArray[Any], classes: int) -> dict[str, float]:
    """Shares in [0, 1] from `true_ranks` and labels, [N]: `acc1`, `acc5` where there are more than
    five classes, and `mean_per_class_recall` over the classes that have images.
    """
    hits = ranks < 1
    count = np.bincount(labels, minlength=classes)
    recall = np.bincount(labels, weights=hits, minlength=classes)[count > 0] / count[count > 0]
    metrics = {"acc1": float(hits.mean()), "mean_per_class_recall": float(recall.mean())}
    if classes > 5:
        metrics["acc5"] = float((ranks < 5).mean())
    return metrics


def average_precisions(
    scores: Floats, truth: NDArray[np.bool_], weights: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Average precision of each class, [C], from scores and labels, [N, C]; NaN without an image.
    `weights` is how often each image counts, [N], or [D, N] for [D, C].
    """
    # Σ_n (R_n − R_{n−1})·P_n from the highest score down; images of equal score make one step.
    counted = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    classes = []
    for column, right in zip(scores.T, truth.T, strict=True):
        order = np.argsort(-column, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(column[order]) != 0, True))
        weighted = counted[..., order]
        hits = np.cumsum(weighted * right[order], axis=-1)[..., ends]
        ranks = np.cumsum(weighted, axis=-1)[..., ends]
        precision = np.divide(hits, ranks, out=np.zeros_like(hits), where=ranks > 0)
        gained = np.diff(hits, axis=-1, prepend=0.0)
        classes.append(shares((gained * precision).sum(axis=-1), hits[..., -1]))
    return np.stack(classes, axis=-1)


def calibration_error(confidences: Floats, hits: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al., ICML 2017), from the probability of each image's best
    label, and whether that label is right, [N].
    """
    # Bin k has confidences above k/15 and up to (k + 1)/15; the first has 0, too.
    bins = np.searchsorted(np.arange(1, BINS) / BINS, confidences, side="left")
    right, sure = (np.bincount(bins, weights, BINS) for weights in (hits, confidences))
    return float(np.abs(right - sure).sum() / len(bins))


def caption_groups(captions: Sequence[str]) -> NDArray[np.int64]:
    """Group number of each caption, int64 [T]; equal captions share a number."""
    # Equal up to compatible forms of Unicode, case, white space, and full stops at the end
    plain = [
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .")
        for text in captions
    ]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(plain))}
    return np.array([numbers[text] for text in plain], np.int64)


def recalls_of(ranks: Mapping[str, Ranks], recalls: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k both ways from `retrieval_ranks`: the share with a true match among the best."""
    return {
        f"{way}_retrieval_recall@{k}": float((values < k).mean())
        for k in recalls
        for way, values in ranks.items()
    }


def retrieval_ranks(
    images: Floats, texts: Floats, image_of: NDArray[Any], groups: NDArray[np.int64] | None = None
) -> dict[str, Ranks]:
    """Rank of the best true match, from 0: `image`, [T], of each text among the images, and `text`,
    [I], of each image among the texts; `image_of` is the image of each text, [T].
    """
    check_finite(images)
    check_finite(texts)
    # An image matches its own texts, and all texts in a group with one of them.
    groups = np.arange(len(texts)) if groups is None else groups
    texts_of_group = _members(groups, np.arange(len(texts)))
    images_of_group = _members(groups, image_of)
    groups_of_image = [np.unique(members) for members in _members(image_of, groups)]
    texts_of_image = [
        np.concatenate([texts_of_group[group] for group in numbers]) for numbers in groups_of_image
    ]
    return {
        "image": _best_ranks(texts, images, [images_of_group[group] for group in groups]),
        "text": _best_ranks(images, texts, texts_of_image),
    }


def _members(keys: NDArray[Any], values: NDArray[Any]) -> list[NDArray[Any]]:
    """Split values by key: an array each for keys 0, 1, 2, ..."""
    return np.split(values[np.argsort(keys, kind="stable")], np.cumsum(np.bincount(keys))[:-1])


def _best_ranks(queries: Floats, items: Floats, matches: Sequence[NDArray[Any]]) -> Ranks:
    """Rank of each query's best true match."""
    parts = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ items.T
        best = [
            numbers[row[numbers].argmax()]
            for row, numbers in zip(scores, matches[start : start + _BLOCK], strict=True)
        ]
        parts.append(true_ranks(scores, np.array(best)))
    return np.concatenate(parts)


def confusion(truth: NDArray[Any], answered: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Count pixels or images by true and answered class, integer [N] each, where an answer equal to
    `classes` means no class; int64 [classes, classes + 1].
    """
    pairs = truth.astype(np.int64) * (classes + 1) + answered
    return np.bincount(pairs.ravel(), minlength=classes * (classes + 1)).reshape(
        classes, classes + 1
    )


def segmentation_metrics(counts: NDArray[np.int64]) -> dict[str, float]:
    """`miou`, `pixel_accuracy` and `mean_class_accuracy` from the `confusion` of all images."""
    means = mean_metrics(np.stack(pixel_sums(counts)).astype(float)[:, None])
    return {name: float(values[0]) for name, values in means.items()}


def pixel_sums(
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Right, true and answered pixels of each class, int64 [C] each, from `confusion`."""
    return counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)[: len(counts)]


def class_ious(
    right: NDArray[Any], true: NDArray[Any], answered: NDArray[Any]
) -> NDArray[np.float64]:
    """Intersection over union of each class; NaN without the class in truth and answers."""
    return shares(right, true + answered - right)


def shares(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """`part / whole`; NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def mean_metrics(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """`segmentation_metrics` of B data sets, [B] each, from their `pixel_sums`, [3, B, C]."""
    right, true, answered = sums
    pixels = true.sum(axis=-1)
    return {
        "miou": _mean_of_known(class_ious(right, true, answered)),
        "pixel_accuracy": right.sum(axis=-1) / np.maximum(pixels, 1),
        "mean_class_accuracy": _mean_of_known(shares(right, true)),
    }


def _mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis, ignoring NaN; 0 if all values are NaN."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1))


def wilson(share: float, n: float) -> Interval:
    """Wilson's interval of a fraction of n cases; an effective n need not be whole."""
    middle = share + _Z**2 / (2 * n)
    spread = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = ((middle + sign * spread) / (1 + _Z**2 / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def mean_recall_interval(hits: NDArray[Any], count: NDArray[Any]) -> Interval:
    """Interval of mean recall over classes, from the right images and all images of each class,
    integer [C]: Wilson's, with an effective sample size.

    The variance of a class with n images is scaled by n/(n - 1), which is unbiased. A class with a
    single image takes the variance of all classes pooled, which is too high where classes differ.
    The mean variance has a degree of freedom for each image beyond the first of its class. The
    pooled variance counts as one more, so that few images do not give a variance of 0 by chance.
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
    """Interval of the mean of `average_precisions`: normal, with the spread of a bootstrap over
    images; None for a single image and for too many scores.
    """
    n = len(scores)
    if n < 2 or scores.size > _MAX_SCORES:
        return None
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_FEWER_DRAWS // _PRECISION_BLOCK):
        times = generator.multinomial(n, np.full(n, 1 / n), _PRECISION_BLOCK)
        means.append(np.nanmean(average_precisions(scores, truth, times), axis=1))
    # Not centred on the mean of the draws, which is too high: copies of an image rank together.
    mean = float(np.nanmean(average_precisions(scores, truth)))
    spread = _Z * float(np.concatenate(means).std(ddof=1))
    return max(0.0, mean - spread), min(1.0, mean + spread)


def paired_difference(
    first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]
) -> tuple[float, float]:
    """Mean lead of one system over another on the same cases, averaged over data sets, and the
    half-width of its normal 95 % interval.
    """
    differences = [
        np.asarray(a, float) - np.asarray(b, float) for a, b in zip(first, second, strict=True)
    ]
    variances = [float(values.var(ddof=1)) / len(values) for values in differences]
    variance = sum(variances) / len(differences) ** 2
    return float(np.mean([values.mean() for values in differences])), _Z * sqrt(variance)


def segmentation_intervals(sums: NDArray[Any]) -> dict[str, Interval]:
    """Intervals of `segmentation_metrics` from a bootstrap over images, from the `pixel_sums` of
    each image, [3, N, C]; empty for a single image.
    """
    _, n, classes = sums.shape
    if n < 2:
        return {}
    generator = np.random.default_rng(0)
    flat = np.moveaxis(sums, 1, 0).reshape(n, -1).astype(float)
    parts = []
    for _ in range(_DRAWS // _DRAWN):
        times = generator.multinomial(n, np.full(n, 1 / n), _DRAWN)
        drawn = (times @ flat).reshape(_DRAWN, 3, classes)
        parts.append(mean_metrics(np.moveaxis(drawn, 0, 1)))
    intervals = {}
    for name in parts[0]:
        low, high = np.percentile(np.concatenate([part[name] for part in parts]), [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals


def fit_confidence(
    cosines: Floats,
    truth: NDArray[np.int64],
    logit_scale: float,
    logit_bias: float | None,
    dataset: str,
) -> Confidence:
    """Fit calibrated scores to the cosines of images, [N, C], and their right labels, [N]."""
    n, classes = cosines.shape
    if n < MIN_IMAGES or classes < 2:
        raise RAdapterError(
            f"{n} validation images of {classes} labels are too few for calibrated scores;"
            f" {MIN_IMAGES} images are needed, and two labels"
        )
    scale, bias = fit_sigmoid(cosines, truth)
    temperature = None if logit_bias is not None else fit_temperature(cosines * logit_scale, truth)
    plain = class_probabilities(cosines, logit_scale, logit_bias)
    best = cosines.argmax(axis=1)

    # Cross-validation: score each half of the images with a fit to the other half.
    halves = [np.arange(n) % 2 == number for number in (0, 1)]
    after = np.full(n, np.nan, np.float32)
    pairs = np.empty_like(plain)
    for half, other in zip(halves, reversed(halves), strict=True):
        pairs[half] = class_probabilities(cosines[half], *fit_sigmoid(cosines[other], truth[other]))
        if logit_bias is not None:
            after[half] = pairs[half, best[half]]
        elif temperature is not None:
            fitted = fit_temperature(cosines[other] * logit_scale, truth[other]) or temperature
            after[half] = class_probabilities(cosines[half], logit_scale / fitted)[
                np.arange(half.sum()), best[half]
            ]

    hits = best == truth
    right = np.arange(classes) == truth[:, None]
    known = not np.isnan(after).any()
    # The highest cosine that `MIN_SCORE_SHARE` of the images reach with their own label.
    own_scores = np.sort(cosines[np.arange(n), truth])
    min_score = float(own_scores[n - ceil(MIN_SCORE_SHARE * n)])
    others = np.where(right, -np.inf, cosines)
    return Confidence(
        scale=scale,
        bias=bias,
        dataset=dataset,
        n=n,
        classes=classes,
        ece_before=calibration_error(plain[np.arange(n), best], hits),
        label_ece=calibration_error(pairs.ravel(), right.ravel()),
        temperature=temperature,
        ece_after=calibration_error(after, hits) if known else None,
        min_score=min_score,
        false_answers=float((others.max(axis=0) >= min_score).mean()),
    )


def fit_temperature(logits: Floats, truth: NDArray[np.int64]) -> float | None:
    """The temperature at which the highest score p best predicts whether its label is right.

    It minimizes the mean over images of -log p where that label is right and of -log(1 - p) where
    it is wrong. Guo et al. maximize the likelihood of the right label, which the wrong images
    dominate where there are many labels: the best label's score becomes too low.

    None if no temperature within `TEMPERATURES` is the best: no image is wrong, or the scores do
    not tell right from wrong. Above `MAX_PAIRS` pairs of image and label, every k-th image is used.
    """
    from scipy.optimize import minimize_scalar  # slow to load

    step = -(-logits.size // MAX_PAIRS)
    truth = truth[::step]
    logits = np.array(logits[::step], np.float64)
    rows = np.arange(len(logits))
    best = logits.argmax(axis=1)
    right = best == truth
    if right.all():
        return None
    signs = np.where(right, -1.0, 1.0)
    logits -= logits[rows, best][:, None]
    logits[rows, best] = -np.inf
    # Shift the other logits so that the highest is 0: the sum of exponentials can't underflow.
    second = logits.max(axis=1)
    logits -= second[:, None]

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        # Log odds of the best label against all others.
        log_odds = -inverse * second - np.log(np.exp(inverse * logits).sum(axis=1))
        return float(np.logaddexp(0, signs * log_odds).mean())

    ends = np.log(TEMPERATURES)
    best_log = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-6}).x
    return float(np.exp(best_log)) if np.abs(ends - best_log).min() > 1e-4 else None


def fit_sigmoid(cosines: Floats, truth: NDArray[np.int64]) -> tuple[float, float]:
    """Scale and bias at which sigmoid(scale x cosine + bias) best predicts which label is right;
    images are thinned as in `fit_temperature`.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    step = -(-cosines.size // MAX_PAIRS)
    cosines, truth = cosines[::step], truth[::step]
    right = (np.arange(cosines.shape[1]) == truth[:, None]).ravel()
    count = right.sum()
    others = len(right) - count
    # Platt's targets: one more pair of each kind, so that the fit is finite even if the cosines
    # separate all pairs.
    target = np.where(right, (count + 1) / (count + 2), 1 / (others + 2))
    values = np.asarray(cosines, np.float64).ravel()
    mean = values.mean()
    spread = max(float(values.std()), 1e-12)
    values = (values - mean) / spread

    def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The mean cross-entropy, and its gradient."""
        logits = line[0] * values + line[1]
        error = expit(logits) - target
        gradient = np.array([(error * values).mean(), error.mean()])
        return float((np.logaddexp(0, logits) - target * logits).mean()), gradient

    start = np.array([0.0, np.log((count + 1) / (others + 1))])
    slope, shift = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(slope / spread), float(shift - slope * mean / spread)
