"""The mask that segmentation gives, with a score for each label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import ENCODER_FAILED, TaskError, invalid

MAX_LABELS = 65_534  # the background's index and every label's fit into uint16


@dataclass
class ScoredMask:
    """The labels of an image's pixels.

    Args:
        mask: uint16 [H, W], index of each pixel's label; C is the background, with a threshold or
            with proposals. H and W are those of the image as it was given: of a decoded file, after
            it was turned by its EXIF orientation.
        scores: float32 [C], or [C + 1] with the background: the mean probability over the pixels
            that got the label (of background pixels, one minus their best label's), 0 where none
            did.
    """

    mask: NDArray[np.uint16]
    scores: NDArray[np.float32]


class MaskTally:
    """A `ScoredMask` while it fills.

    Args:
        shape: of the mask.
        labels: how many there are, C.
        background: whether pixels may be background, which is C.
        threshold: probability below which a pixel is background, or None.
    """

    def __init__(
        self, shape: tuple[int, ...], labels: int, background: bool, threshold: float | None
    ) -> None:
        self._mask = np.empty(shape, np.uint16)
        self._labels = labels
        self._background = background
        self._threshold = threshold
        self._sums = np.zeros(labels + background)
        self._pixels = np.zeros(len(self._sums), np.int64)

    def put(self, where: Any, best: NDArray[np.intp], probabilities: NDArray[np.float32]) -> None:
        """Label the pixels `where`; `best` may hold the background already."""
        if self._threshold is not None:
            best = np.where(probabilities < self._threshold, self._labels, best)
        if self._background:
            probabilities = np.where(best == self._labels, 1 - probabilities, probabilities)
        self._mask[where] = best
        self._sums += np.bincount(best.ravel(), probabilities.ravel(), len(self._sums))
        self._pixels += np.bincount(best.ravel(), minlength=len(self._sums))

    def result(self, shape: tuple[int, ...] | None = None) -> ScoredMask:
        """The mask, in another shape if one is given, and its scores."""
        scores = np.asarray(self._sums / np.maximum(self._pixels, 1), np.float32)
        return ScoredMask(self._mask if shape is None else self._mask.reshape(shape), scores)


def finite(embeds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings as an encoder gave them; raises a `TaskError` where some are NaN or infinite."""
    if not np.isfinite(embeds).all():
        raise TaskError(
            ENCODER_FAILED, "the embeddings hold values that are not finite (NaN or infinite)"
        )
    return embeds


def check_label_embeddings(embeds: NDArray[np.float32]) -> None:
    """Raise a `TaskError` for no or too many labels, or embeddings that are not finite."""
    if not 1 <= len(embeds) <= MAX_LABELS:
        raise invalid(f"{len(embeds)} labels; 1 to {MAX_LABELS} are allowed")
    finite(embeds)
