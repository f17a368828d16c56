"""Sliding windows over an image, and the way back from their patches to pixels, one axis at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**22  # values worked on at once: bounds the memory
_CACHED = 2**18  # values of which a block and its sums stay in a core's second cache
BAND = 256  # pixels whose weights are computed at once


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover every pixel of an axis; the last is shifted back to
    end at the border.
    """
    return [*range(0, length - window, stride), length - window]


@dataclass(frozen=True)
class Axis:
    """Rows (or columns) of an image as weighted sums of rows (or columns) of its windows' patches.

    Everything between patches and pixels is linear and acts on each axis alone: patches are
    upsampled to their window, overlapping windows averaged, and the working image resized to the
    image's own size, both bilinearly as torch does with `align_corners=False`. So no map of the
    working image is ever held.
    """

    pixels: int  # of the image itself
    working: int  # pixels of the working image, which the windows cover
    window: int  # pixels of a window
    grid: int  # patches of a window
    starts: tuple[int, ...]  # first working pixel of each window

    def weights(self, first: int, last: int) -> tuple[slice, NDArray[np.float32]]:
        """For the image's own pixels first..last-1: which K of the patches (windows one after the
        other) count, and their weights, float32 [last - first, K].
        """
        low, high, share = _between(np.arange(first, last), self.pixels, self.working)
        share = share[:, None]
        total = self._of_working(low) * (1 - share) + self._of_working(high) * share
        used = np.flatnonzero(total.any(0))
        which = slice(int(used[0]), int(used[-1]) + 1)
        return which, np.ascontiguousarray(total[:, which], np.float32)

    def _of_working(self, positions: NDArray[np.intp]) -> NDArray[np.float64]:
        """Weights [n, windows x grid] for pixels of the working image: the mean over the windows
        that cover each.
        """
        total = np.zeros((len(positions), len(self.starts), self.grid))
        within = positions[:, None] - np.array(self.starts)
        position, window = np.nonzero((within >= 0) & (within < self.window))
        low, high, share = _between(within[position, window], self.window, self.grid)
        total[position, window, low] += 1 - share
        total[position, window, high] += share
        total /= total.sum((1, 2), keepdims=True)
        return total.reshape(len(positions), -1)


def upsampled(
    values: NDArray[np.float32], rows: Axis, columns: Axis
) -> Iterator[tuple[tuple[slice, slice], NDArray[np.float32]]]:
    """The values [k, C, l] of patches at the image's own pixels, block by block: where, and float32
    [C, h, w].
    """
    count = values.shape[1]
    across = _bands(columns, BAND)
    step = max(1, _CACHED // (min(columns.pixels, BAND) * count))
    for vertical, above, down in _bands(rows, min(step, BAND)):
        for horizontal, patches, along in across:
            part = values[above, :, patches]
            part = down @ part.reshape(len(part), -1)
            part = part.reshape(len(down), count, -1).transpose(1, 0, 2)
            block = part.reshape(-1, part.shape[2]) @ along.T
            yield (vertical, horizontal), block.reshape(count, len(down), -1)


@lru_cache(maxsize=8)  # those of four sizes of images, some megabytes at most
def _bands(axis: Axis, step: int) -> tuple[tuple[slice, slice, NDArray[np.float32]], ...]:
    """The image's own pixels in bands of at most `step`: which, which of the patches count, and
    their `weights`.
    """
    bands = []
    for first in range(0, axis.pixels, BAND):
        which, weights = axis.weights(first, min(first + BAND, axis.pixels))
        for start in range(0, len(weights), step):
            band = weights[start : start + step]
            used = np.flatnonzero(band.any(0))
            begin = int(used[0])
            end = int(used[-1]) + 1
            kept = np.ascontiguousarray(band[:, begin:end])
            kept.flags.writeable = False  # callers share it
            bands.append(
                (
                    slice(first + start, first + start + len(band)),
                    slice(which.start + begin, which.start + end),
                    kept,
                )
            )
    return tuple(bands)


def _between(
    positions: NDArray[np.intp], size: int, source: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """For pixels of an axis of `size`, resized from `source`: the two source pixels and the share
    of the second.
    """
    at: NDArray[np.float64] = np.clip((positions + 0.5) * source / size - 0.5, 0, source - 1)
    low = np.floor(at).astype(np.intp)
    return low, np.minimum(low + 1, source - 1), at - low
