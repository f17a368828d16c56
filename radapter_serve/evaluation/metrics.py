"""Metrics, their intervals of 95 % (how far off a figure may be because other images of the same
kind could have been drawn), and the fit of calibrated scores: one temperature for the softmax over
labels, and a sigmoid for labels on their own.

Temperature scaling is Guo et al.'s (ICML 2017), fitted to the best label alone as Le Coz et al.
(NeurIPS 2024) do; the sigmoid is Platt's (1999), on all pairs of an image and a label.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.labels import class_probabilities
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import KEPT, Confidence

Floats = NDArray[np.float32]
Ranks = NDArray[np.int64]
Interval = tuple[float, float]
RECALLS = (1, 5, 10)
# Of confidence, equally wide, as Guo et al. (ICML 2017) have them for the calibration error.
BINS = 15
_BLOCK = 1024  # rows of similarities in memory at once
NOT_FINITE = (
    "the embeddings hold values that are not finite (NaN or infinite); the weights or the adapter"
    " are broken"
)
_Z = 1.959964  # of the normal distribution, 95 % within
_DRAWS = 1000  # of a bootstrap
_DRAWN = 100  # draws in memory at once
_FEWER_DRAWS = 200  # where each takes long
_PRECISION_BLOCK = 20
_MAX_SCORES = 5_000_000  # of an image and a class
LEAST = 100  # images
MAX_PAIRS = 4_000_000  # of an image and a label, by which is fitted
RANGE = (0.01, 100.0)  # of temperatures


def check_finite(values: Floats) -> Floats:
    """Return values; an error where some are not finite, so that they can't be ranked."""
    if not np.isfinite(values).all():
        raise RAdapterError(NOT_FINITE)
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
    """The average precision of each class, float64 [C] in [0, 1], from scores and labels, [N, C];
    NaN for a class without an image.

    `Σ_n (R_n − R_{n−1})·P_n` over the scores from the highest on, in which images of equal score
    come together; no interpolation. `weights` say how often each image counts, [N], or for several
    draws [D, N], which gives [D, C].
    """
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
    """Expected calibration error (ECE; Guo et al., ICML 2017): the sum over bins of
    n_b/N * |accuracy_b - confidence_b|, in [0, 1]; from the probability of the best label of each
    image, and whether it is right, [N].

    Bin k holds confidences above k/15 and up to (k + 1)/15, and the first bin 0 too.
    """
    bins = np.searchsorted(np.arange(1, BINS) / BINS, confidences, side="left")
    right, sure = (np.bincount(bins, weights, BINS) for weights in (hits, confidences))
    return float(np.abs(right - sure).sum() / len(bins))


def caption_groups(captions: Sequence[str]) -> NDArray[np.int64]:
    """A number for each caption that equal captions share, int64 [T].

    Captions are equal where they differ by nothing but Unicode's compatible forms (NFKC), upper and
    lower case, white space, and full stops at the end.
    """
    plain = [
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .")
        for text in captions
    ]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(plain))}
    return np.array([numbers[text] for text in plain], np.int64)


def recalls_of(ranks: Mapping[str, Ranks], recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """Recall at k both ways, from `retrieval_ranks`: shares in [0, 1], `image_retrieval_recall@k`
    over the texts and `text_retrieval_recall@k` over the images. A hit is at least one true match
    among the best k.
    """
    return {
        f"{way}_retrieval_recall@{k}": float((values < k).mean())
        for k in recalls
        for way, values in ranks.items()
    }


def retrieval_ranks(
    images: Floats,
    texts: Floats,
    image_of: NDArray[Any],
    groups: NDArray[np.int64] | None = None,
) -> dict[str, Ranks]:
    """The rank of the best true match both ways, 0 the best: `image`, int64 [T], where each text
    looks for any of its images, and `text`, int64 [I], where each image looks for any of its texts.

    Embeddings are unit length, [I, D] and [T, D]; each image has a text at least, and `image_of`
    says which image a text belongs to, [T]. An image and a text are a true match where the image
    has that text, or one of its group by `caption_groups`.
    """
    check_finite(images)
    check_finite(texts)
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
    """The values of each key 0, 1, 2, ..."""
    return np.split(values[np.argsort(keys, kind="stable")], np.cumsum(np.bincount(keys))[:-1])


def _best_ranks(queries: Floats, items: Floats, matches: Sequence[NDArray[Any]]) -> Ranks:
    """The rank of the best among the true matches of each query."""
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
    """Counts of pixels or images by true class, integer [N], and answered class, where `classes`
    means no class; int64 [classes, classes + 1].
    """
    pairs = truth.astype(np.int64) * (classes + 1) + answered
    return np.bincount(pairs.ravel(), minlength=classes * (classes + 1)).reshape(
        classes, classes + 1
    )


def segmentation_metrics(counts: NDArray[np.int64]) -> dict[str, float]:
    """Shares in [0, 1] from `confusion`, summed over the images of a set: `miou`, the mean of
    `class_ious` over the classes that the truth or the answers have anywhere in the set;
    `pixel_accuracy`; `mean_class_accuracy` over the classes that the truth has.
    """
    means = mean_metrics(np.stack(pixel_sums(counts)).astype(float)[:, None])
    return {name: float(values[0]) for name, values in means.items()}


def pixel_sums(
    counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each class's pixels that are right, true and answered, int64 [C] each, from `confusion`."""
    return counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)[: len(counts)]


def class_ious(
    right: NDArray[Any], true: NDArray[Any], answered: NDArray[Any]
) -> NDArray[np.float64]:
    """Intersection over union of each class, in [0, 1]; NaN where neither the truth nor the answers
    have it.
    """
    return shares(right, true + answered - right)


def shares(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Part by whole; NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def mean_metrics(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """`segmentation_metrics`, [B] each, of B data sets of the same classes, from `pixel_sums`,
    [3, B, C].
    """
    right, true, answered = sums
    pixels = true.sum(axis=-1)
    return {
        "miou": _mean_of_known(class_ious(right, true, answered)),
        "pixel_accuracy": right.sum(axis=-1) / np.maximum(pixels, 1),
        "mean_class_accuracy": _mean_of_known(shares(right, true)),
    }


def _mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the last axis without NaN; 0 where all are."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1))


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
    variances = [float(values.var(ddof=1)) / len(values) for values in differences]
    variance = sum(variances) / len(differences) ** 2
    return float(np.mean([values.mean() for values in differences])), _Z * sqrt(variance)


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
            fitted = fit_temperature(cosines[other] * logit_scale, truth[other]) or temperature
            after[half] = class_probabilities(cosines[half], logit_scale / fitted)[
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
        ece_before=calibration_error(plain[np.arange(n), best], hits),
        label_ece=calibration_error(pairs.ravel(), right.ravel()),
        temperature=temperature,
        ece_after=calibration_error(after, hits) if known else None,
        min_score=min_score,
        false_answers=float((others.max(axis=0) >= min_score).mean()),
    )


def fit_temperature(logits: Floats, truth: NDArray[np.int64]) -> float | None:
    """The temperature at which the highest score p predicts best whether its label is right.

    The mean of -log p where it is right, and of -log(1 - p) where it is wrong, is least there. The
    likelihood of the right label, which Guo et al. take, is ruled by the images that are wrong
    where there are many labels: it makes the best label's score too low.

    None where there is no such temperature within `RANGE`: no image is wrong, or the scores do not
    tell right from wrong. Of more than `MAX_PAIRS` of an image and a label, every k-th image
    counts.
    """
    from scipy.optimize import minimize_scalar  # which takes a while to load

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


def fit_sigmoid(cosines: Floats, truth: NDArray[np.int64]) -> tuple[float, float]:
    """Scale and bias at which sigmoid(scale x cosine + bias) says best which label is right, by as
    many images as `fit_temperature` takes.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    step = -(-cosines.size // MAX_PAIRS)
    cosines, truth = cosines[::step], truth[::step]
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

    def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The mean cross-entropy, and its gradient."""
        logits = line[0] * values + line[1]
        error = expit(logits) - target
        gradient = np.array([(error * values).mean(), error.mean()])
        return float((np.logaddexp(0, logits) - target * logits).mean()), gradient

    start = np.array([0.0, np.log((count + 1) / (others + 1))])
    slope, shift = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(slope / spread), float(shift - slope * mean / spread)
