"""Pixel-adaptive mask refinement: score maps are smoothed where the image is, and stop at its
edges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Pixels between a pixel and its neighbours; one 3 x 3 ring each. NACLIP's.
DILATIONS = (8, 16)
_RING = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def refine(
    maps: NDArray[np.float32],
    image: NDArray[np.uint8],
    steps: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Replace, `steps` times, each pixel's scores by the mean of its neighbours', weighted by
    likeness of colour.

    The weights are softmax over the neighbours of -|I_i - I_j| / (0.1 s_i), mean over the channels,
    where s_i is the standard deviation of the colours around pixel i (Araslanov & Roth,
    "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.3).

    Args:
        maps: float32 [C, h, w], changed in place.
        image: uint8 [h, w, 3].
        steps: number of iterations; 10 is usual.
        check: called after each map; may raise.
    """
    height, width = image.shape[:2]
    border = max(DILATIONS)
    views = [
        (
            slice(border + y * d, border + y * d + height),
            slice(border + x * d, border + x * d + width),
        )
        for d in DILATIONS
        for y, x in _RING
    ]
    weights = _weights(image, views, border)
    product = np.empty((height, width), np.float32)
    # One by one: a map, its weights and the product stay in the cache.
    for scores in maps:
        for _ in range(steps):
            padded = np.pad(scores, border, mode="edge")
            scores[:] = 0
            for weight, view in zip(weights, views, strict=True):
                scores += np.multiply(weight, padded[view], out=product)
        check()


def _weights(
    image: NDArray[np.uint8], views: list[tuple[slice, slice]], border: int
) -> NDArray[np.float32]:
    """float32 [neighbours, h, w], of sum one at each pixel."""
    logits = np.zeros((len(views), *image.shape[:2]), np.float32)
    for channel in np.moveaxis(image, 2, 0).astype(np.float32) / 255:
        padded = np.pad(channel, border, mode="edge")
        # Around a pixel: its neighbours, and the pixel itself once for each ring.
        around = [padded[view] for view in views] + [channel] * len(DILATIONS)
        mean = sum(around[1:], around[0]) / len(around)
        deviation = np.sqrt(sum((values - mean) ** 2 for values in around) / (len(around) - 1))
        for logit, view in zip(logits, views, strict=True):
            logit -= np.abs(channel - padded[view]) / (1e-8 + 0.1 * deviation) / 3
    logits -= logits.max(0)
    np.exp(logits, out=logits)
    logits /= logits.sum(0)
    return logits
