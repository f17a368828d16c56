"""Options of both ways to segment, and their result: a mask with a score a label."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Encode
from radapter_serve.contract.errors import ENCODER_FAILED, TaskError, invalid

S = TypeVar("S")
# Yields images for an encoder, uint8 [B, S, S, 3], and is sent what it makes of them.
Windows: TypeAlias = Generator[NDArray[np.uint8], NDArray[np.float32], S]

MAX_REFINE = 100
MAX_LABELS = 65_534  # the background's index and every label's fit into uint16


@dataclass(frozen=True)
class SegmentOptions:
    """How an image is segmented; raises a `TaskError` for a value out of its range."""

    # Shorter side in pixels of the working image that windows go over. None: 1.5 windows (336 for
    # 224, as SCLIP has it), so that each pixel is seen in two or more contexts, and small objects
    # get more patches.
    short_side: int | None = None
    stride: int | None = None  # pixels from one window to the next; None: half a window
    refine: int = 0  # steps of pixel-adaptive refinement of the cosines; 10 is usual
    # Probability below which a pixel is background. None: only pixels that no proposal covers are.
    threshold: float | None = None
    # w of the fusion p = p_proposal^(1-w) p_clip^w, for proposals that bring scores.
    proposal_weight: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (("short_side", self.short_side), ("stride", self.stride)):
            if value is not None and value < 1:
                raise invalid(f"{name} is {value}; a number of pixels, 1 or more")
        if not 0 <= self.refine <= MAX_REFINE:
            raise invalid(f"refine is {self.refine}; 0 (none) to {MAX_REFINE} steps, 10 is usual")
        for name, share in (
            ("threshold", self.threshold),
            ("proposal_weight", self.proposal_weight),
        ):
            if share is not None and not 0 <= share <= 1:
                raise invalid(f"{name} is {share}; allowed: 0 to 1")

    def sizes(self, window: int) -> tuple[int, int]:
        """`short_side` and `stride` in pixels, with their usual values where they are None.

        Raises a `TaskError` for a working image smaller than a window of `window` pixels, or
        windows that leave pixels out.
        """
        short_side = window + window // 2 if self.short_side is None else self.short_side
        stride = max(1, window // 2) if self.stride is None else self.stride
        if short_side < window:
            raise invalid(f"short_side is {short_side}; at least {window}, the size of a window")
        if stride > window:
            raise invalid(f"stride is {stride}; 1 to {window}, the size of a window")
        return short_side, stride


USUAL = SegmentOptions()


@dataclass
class ScoredMask:
    """The labels of an image's pixels, and a score a label: the mean probability over its pixels
    (of background, one minus the best label's), 0 where there are none.
    """

    mask: NDArray[np.uint16]  # [H, W], the image as it was turned; C is background, if there is any
    scores: NDArray[np.float32]  # [C], or [C + 1] with the background


class MaskTally:
    """A `ScoredMask` while it fills; pixels may be background, of index `labels`, if `background`
    is set, and are where their probability is below a threshold.
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


def encode_windows(windows: Windows[S], encode: Encode) -> S:
    """Run a segmentation by an encoder alone, such as one in torch."""
    try:
        batch = next(windows)
        while True:
            batch = windows.send(encode(batch))
    except StopIteration as done:
        result: S = done.value
        return result
