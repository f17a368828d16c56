"""Probabilities of labels from their cosines with images, and labels that are too much alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SAME = 0.9999  # cosine above which two labels give an image the same score, but for rounding
_BLOCK = 1024  # rows of cosines in memory at once


def class_probabilities(
    cosines: NDArray[np.float32], logit_scale: float, logit_bias: float | None = None
) -> NDArray[np.float32]:
    """The probability of each label, float32 [..., C] in [0, 1], from the cosines of images or
    patches with the labels: a softmax, or with the bias of a model that was trained with a sigmoid
    loss (SigLIP) a sigmoid for each label alone.
    """
    logits = np.asarray(cosines, np.float32) * np.float32(logit_scale)
    if logit_bias is not None:
        return np.asarray(
            1 / (1 + np.exp(-np.clip(logits + np.float32(logit_bias), -80, 80))), np.float32
        )
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(-1, keepdims=True)
    return logits


def best_class(
    cosines: NDArray[np.float32], logit_scale: float, logit_bias: float | None = None
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The best label of each place and its probability, as `class_probabilities` has them, without
    the probabilities of the others.
    """
    greatest = cosines.max(0)
    winners = cosines == greatest
    best = np.empty(len(greatest), np.intp)
    # Of equal ones the first is written last. Near each other, few labels win anywhere.
    for label in np.flatnonzero(winners.any(1))[::-1]:
        np.copyto(best, label, where=winners[label])
    if logit_bias is not None:
        return best, class_probabilities(greatest, logit_scale, logit_bias)
    cosines -= greatest
    cosines *= np.float32(logit_scale)
    np.exp(cosines, out=cosines)
    return best, 1 / cosines.sum(0)


def indistinguishable(
    labels: Sequence[str], embeddings: NDArray[np.float32]
) -> list[tuple[str, str]]:
    """The labels that the text tower can't tell apart from an earlier one: every image scores both
    alike.
    """
    pairs = []
    for start in range(0, len(labels), _BLOCK):
        alike = embeddings[start : start + _BLOCK] @ embeddings.T > SAME
        for row, first in enumerate(alike.argmax(1), start):
            if first < row and alike[row - start, first]:
                pairs.append((labels[first], labels[row]))
    return pairs
