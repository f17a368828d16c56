"""Drawings that are nearly the same, whoever's name they bear: many sets descend from others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 20  # of the small picture that is compared
ALIKE = 0.9  # correlation of two small pictures, from which on they count as one drawing


def signature(drawn: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a drawing is compared by: how dark it is on white paper, cut to its ink, made small,
    mean 0, length 1.

    Args:
        drawn: premultiplied RGBA, uint8 [S, S, 4], not empty.

    Returns:
        float32 [400].
    """
    alpha = drawn[..., 3].astype(np.float32)
    ink = alpha - drawn[..., :3].astype(np.float32) @ np.array([0.3, 0.59, 0.11], np.float32)
    rows, columns = (np.flatnonzero((alpha > 64).any(axis=axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)  # padded to a square, so that a flat drawing is not like a high one
    square = np.zeros((side, side), np.float32)
    top = (side - cut.shape[0]) // 2
    left = (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    small = np.asarray(
        Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32
    ).ravel()
    small = small - small.mean()
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-6), np.float32)


def alike(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of the signatures [N, 400] are nearly the same as which of the others [M, 400]: bool
    [N, M].
    """
    return np.asarray(first @ second.T >= ALIKE)


def clusters(signatures: NDArray[np.float32], groups: list[str]) -> list[list[int]]:
    """What belongs together: drawings of one group, those that are nearly the same, and whatever is
    joined by these.

    Args:
        signatures: float32 [N, 400].
        groups: of each drawing.

    Returns:
        Numbers of drawings, by cluster, in the order of each one's first.
    """
    together = alike(signatures, signatures) | np.array([[a == b for b in groups] for a in groups])
    found: list[list[int]] = []
    left = set(range(len(groups)))
    while left:
        members = set()
        edge = {min(left)}
        while edge:
            members |= edge
            edge = {int(other) for one in edge for other in np.flatnonzero(together[one])} - members
        found.append(sorted(members))
        left -= members
    return found
