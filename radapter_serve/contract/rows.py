"""Rows of photos: the embedding of a label that photos show, and the choice of how far it moves.

A label's row is `t + b·d` at unit length. t is the embedding of its text, and d, its direction, is
what sets its photos apart from those of the other labels:

    d = n / (n + 2) · (mean of its n photos - m),     m the mean of all labels' means

Images and texts lie in two cones. A row that moved towards its photos would leave the cone of the
texts, and beat all labels without photos whatever an image shows; a difference of means of images
has no part of that gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

GRID = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of b, the first 0
UNJUDGED = 1.0  # b where too few photos can be judged
LEAST_JUDGED = 0.5  # fraction of the photos that must share their label with another one
LEAST_KEPT = 0.95  # of the base's right answers for labels without photos
RULE = (
    "b is the smallest of the grid within one standard error of the best (of the paired difference"
    " over photos; Breiman et al., 1984), where each photo is judged by rows that were made without"
    f" it; and at most the largest that keeps {LEAST_KEPT:.0%} of the base's right answers for"
    " labels without photos, where each label in turn counts as one of them"
)
_PRIOR = 2.0  # photos that a label's text counts for
_SHORT = 1e-6  # length below which a sum of unit vectors has no direction
_BLOCK = 1 << 15  # cosines of photos and labels that are compared at a time
_MOST = 1 << 17  # cosines to compare at all: of more photos, some are judged
_FEWEST = 1000  # photos that are judged with however many labels


def sums_of(photos: Floats, labels: Integers, count: int) -> tuple[Floats, Integers]:
    """Add up the photos' embeddings [N, D] of each of `count` labels: sums, float64 [C, D], and
    numbers [C]. They are added in their order, so one that is added later gives the same bits.
    """
    sums = np.zeros((count, photos.shape[1]))
    for label, photo in zip(labels.tolist(), photos, strict=True):
        sums[label] += photo
    return sums, np.bincount(labels, minlength=count)


def directions(sums: Floats, counts: Integers) -> Floats:
    """The direction of each label, float64 [C, D]: zero without photos, and where only one label
    has some, as there is nothing to compare them with.
    """
    shown = counts > 0
    towards = np.zeros(sums.shape)
    if shown.any():
        means = sums[shown] / counts[shown, None]
        towards[shown] = _share(counts[shown])[:, None] * (means - means.mean(axis=0))
    return towards


def moved(texts: Floats, towards: Floats, b: float | Sequence[float]) -> NDArray[np.float32]:
    """Rows of unit length [C, D]: `texts + b·towards`, with one b or one for each label.

    An infinite b leaves the text out. A label that does not move keeps its text to the bit, and so
    does one whose row would have no direction.
    """
    factors = np.broadcast_to(np.asarray(b, np.float64), len(texts))
    moving = np.flatnonzero(towards.any(axis=1) & (factors != 0))
    factors = factors[moving, None]
    alone = np.isinf(factors)
    own = texts[moving]
    sums = np.where(alone, 0, own) + np.where(alone, 1, factors) * towards[moving]
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    result = texts.astype(np.float32)
    result[moving] = np.where(lengths > _SHORT, sums / np.maximum(lengths, _SHORT), own)
    return result


def rows(
    texts: Floats, sums: Floats, counts: Integers, b: float | Sequence[float]
) -> NDArray[np.float32]:
    """The rows of labels [C, D] from their texts' unit embeddings, and the sums and numbers of
    their photos.
    """
    return moved(texts, directions(sums, counts), b)


def b_of(weight: float) -> float:
    """The b of a fixed weight w in [0, 1], w / (1 - w): 0 is the text alone, 0.5 gives text and
    direction the same weight, 1 leaves the text out.
    """
    return weight / (1 - weight) if weight < 1 else np.inf


@dataclass(frozen=True)
class Judged:
    """Photos at each of the B values of `GRID`: whether the label of each is the best."""

    photos: int  # that were to be judged
    right: Bools  # of photos, by rows that were made without the photo [B, N]
    # Of photos that the base has right, by rows that were made without any photo of their label
    # [B, M]: as if it were a label without photos.
    kept: Bools

    @classmethod
    def joined(cls, parts: Sequence[Judged]) -> Judged:
        """Join the photos of several parts, such as folds."""
        right = np.concatenate([part.right for part in parts], axis=1)
        kept = np.concatenate([part.kept for part in parts], axis=1)
        return cls(sum(part.photos for part in parts), right, kept)


@dataclass(frozen=True)
class Step:
    """The figures of one b, all in [0, 1]."""

    b: float
    score: float  # fraction of the photos that are right
    behind: float  # distance from the best score
    error: float  # standard error of this distance
    kept: float  # of the base's right answers for labels without photos

    @property
    def as_good(self) -> bool:
        """True if the score is within one standard error of the best."""
        return self.behind <= self.error + 1e-9


@dataclass(frozen=True)
class ChosenB:
    """The b that `RULE` takes, and the figures of each; none if too few photos could be judged."""

    b: float
    curve: tuple[Step, ...] = ()


def judge(
    texts: Floats,
    photos: Floats,
    labels: Integers,
    judged: Integers | None = None,
    *,
    totals: tuple[Floats, Integers] | None = None,
) -> Judged:
    """Judge photos by rows that were made without them, in closed form.

    Args:
        texts: unit embeddings of all labels [C, D]. If they are learned, by a run that had none of
            the judged photos.
        photos: unit embeddings of the labels' photos [N, D].
        labels: the label of each photo [N].
        judged: numbers of the photos to judge, such as those of a fold; None for all, or, of very
            many, for some that are spread over them. The only photo of a label counts for `kept`
            alone: without it the label is a text.
        totals: the result of `sums_of`, which takes longer than the rest, if it is known.
    """
    sums, counts = totals or sums_of(photos, labels, len(texts))
    shown = np.flatnonzero(counts)
    k = len(shown)
    if judged is None:
        most = max(_FEWEST, _MOST // max(1, k))
        judged = np.arange(0, len(photos), max(1, -(-len(photos) // most)))
    right = [np.zeros((len(GRID), 0), bool)]
    kept = [np.zeros((len(GRID), 0), bool)]

    # Of labels with photos, the products of texts t, means, and d = mean - mean of the means.
    n = counts[shown]
    t = texts[shown].astype(np.float32)
    means = (sums[shown] / n[:, None]).astype(np.float32)
    t_means = t @ means.T
    means_means = means @ means.T
    d_means = means_means - means_means.mean(axis=0)
    td = t_means - t_means.mean(axis=1, keepdims=True)
    dd = d_means - d_means.mean(axis=1, keepdims=True)
    share = _share(n).astype(np.float32)
    number_of = np.zeros(len(texts), np.intp)
    number_of[shown] = np.arange(k)
    # The rows of the other labels do not move.
    others = np.delete(texts, shown, axis=0).astype(np.float32)

    size = max(1, _BLOCK // max(1, k))
    for part in (judged[start : start + size] for start in range(0, len(judged), size)):
        v = photos[part].astype(np.float32)
        c = number_of[labels[part]]
        own = np.arange(len(part)), c
        vt = v @ t.T
        v_means = v @ means.T
        vd = v_means - v_means.mean(axis=1, keepdims=True)
        best_other = (v @ others.T).max(axis=1, initial=-1)

        # Without v, the mean of its label moves by e / (n - 1), where e = mean - v, and the mean of
        # the means by a part of that. So each direction is weight·(d + g·e).
        left = np.maximum(n[c] - 1, 1).astype(np.float32)
        g = np.repeat(-1 / (k * left)[:, None], k, axis=1)
        g[own] += 1 / left
        weight = np.tile(share, (len(part), 1))
        weight[own] = _share(left)
        ve = v_means[own] - (v * v).sum(axis=1)
        te = t_means.T[c] - vt
        de = d_means.T[c] - vd
        ee = means_means[c, c] - v_means[own] - ve
        v_direction = weight * (vd + g * ve[:, None])
        t_direction = weight * (td.diagonal() + g * te)
        squares = weight**2 * (dd.diagonal() + g * (2 * de + g * ee[:, None]))
        best = _best(vt, v_direction, t_direction, squares, own, best_other)
        right.append(best[:, n[c] > 1])

        # Without all photos of its label, the mean of the means moves by d / (1 - k), and the label
        # does not move. Each direction is weight·(d + g·d of this label).
        if len(others) and k > 2:
            weight = np.tile(share, (len(part), 1))
            weight[own] = 0
            part_of = 1 / (k - 1)
            v_direction = weight * (vd + part_of * vd[own][:, None])
            t_direction = weight * (td.diagonal() + part_of * td.T[c])
            squares = dd.diagonal() + part_of * (2 * dd[c] + part_of * dd[c, c][:, None])
            squares = weight**2 * squares
            best = _best(vt, v_direction, t_direction, squares, own, best_other)
            kept.append(best[:, best[0]])
    return Judged(len(judged), np.concatenate(right, axis=1), np.concatenate(kept, axis=1))


def _best(
    vt: Floats,
    v_direction: Floats,
    t_direction: Floats,
    squares: Floats,
    own: tuple[Integers, Integers],
    best_other: Floats,
) -> Bools:
    """Whether each photo v is nearest to its own label, at each b of `GRID`: from the products of
    v, the texts t of the labels with photos, and their directions [n, K], the squares of these, and
    the cosine of the best label without photos.
    """
    best = []
    for b in GRID:
        lengths = np.sqrt(np.maximum(1 + b * (2 * t_direction + b * squares), _SHORT))
        cosines = (vt + b * v_direction) / lengths
        of_own = cosines[own]
        cosines[own] = best_other
        best.append(of_own > cosines.max(axis=1))
    return np.stack(best)


def choose(judged: Judged) -> ChosenB:
    """Choose b with `RULE`."""
    count = judged.right.shape[1]
    shares = judged.kept.mean(axis=1) if judged.kept.size else np.ones(len(GRID))
    lasting = [b for b, share in zip(GRID, shares, strict=True) if share >= LEAST_KEPT]
    if count < LEAST_JUDGED * judged.photos:
        return ChosenB(max(b for b in lasting if b <= UNJUDGED))
    scores = judged.right.mean(axis=1)
    differences = judged.right[scores.argmax()].astype(np.float64) - judged.right
    errors = differences.std(axis=1) / count**0.5
    figures = zip(GRID, scores, differences.mean(axis=1), errors, shares, strict=True)
    curve = tuple(Step(b, *map(float, values)) for b, *values in figures)
    smallest = min(step.b for step in curve if step.as_good)
    return ChosenB(max(b for b in lasting if b <= smallest), curve)


def choose_b(
    texts: Floats,
    photos: Floats,
    labels: Integers,
    *,
    totals: tuple[Floats, Integers] | None = None,
) -> ChosenB:
    """Choose b for labels [C, D] and the photos [N, D] that show some of them, as in `judge`; 0 if
    these are of fewer than two labels, as then nothing moves.
    """
    if len(np.unique(labels)) < 2:
        return ChosenB(0.0)
    return choose(judge(texts, photos, labels, totals=totals))


def _share(counts: Floats | Integers) -> Floats:
    """The weight of n photos against the text, n / (n + 2)."""
    return np.asarray(counts / (counts + _PRIOR))
