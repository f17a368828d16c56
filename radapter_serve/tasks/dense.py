"""Dense segmentation: cosines of labels with the patches of windows over an image, mapped to its
pixels. Also has the options and the result of segmentation with proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.errors import (
    INVALID_IMAGE,
    Cancelled,
    Encode,
    TaskError,
    check_cancelled,
    invalid,
)
from radapter_serve.contract.labels import best_class
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.tasks.embed import finite

S = TypeVar("S")
# Yields images for an encoder, uint8 [B, S, S, 3], and is sent their embeddings.
Windows: TypeAlias = Generator[NDArray[np.uint8], NDArray[np.float32], S]

MAX_REFINE = 100
MAX_LABELS = 65_534  # the background's index and every label's fit into uint16
# Scale of the softmax over a pixel's cosines, from SCLIP (Wang et al., ECCV 2024); patches are less
# certain than whole images.
PATCH_SCALE = 40.0
MAX_WINDOWS = 500
MAX_VALUES = 2**27  # cosines of one image in memory, half a gigabyte
# Distances in pixels of a pixel's neighbours, each a ring of 3 x 3; from NACLIP.
DILATIONS = (8, 16)
_RING = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
BLOCK = 2**22  # values worked on at once: bounds the memory
_CACHED = 2**18  # values of a block that fits, with its sums, into a core's L2 cache
BAND = 256  # pixels whose weights are computed at once


@dataclass(frozen=True)
class SegmentOptions:
    """Options of a segmentation; raises a `TaskError` for a value out of its range."""

    # Shorter side in pixels of the working image, which the windows cover. None: 1.5 windows (336
    # for 224, as in SCLIP), so that windows overlap, and small objects get more patches.
    short_side: int | None = None
    stride: int | None = None  # pixels between the starts of windows; None: half a window
    # Steps of pixel-adaptive refinement of the cosines; 10 is usual. None: none.
    refine: int | None = None
    # Probability below which a pixel is background. None: only pixels without a proposal are.
    threshold: float | None = None
    # w of the fusion p = p_proposal^(1-w) p_clip^w, for proposals with scores. None: 0.7.
    proposal_weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_side", "stride"):
            pixels = getattr(self, name)
            if pixels is not None and pixels < 1:
                raise invalid(f"{name} is {pixels}; a number of pixels, 1 or more")
        if self.refine is not None and not 0 <= self.refine <= MAX_REFINE:
            raise invalid(f"refine is {self.refine}; 0 (none) to {MAX_REFINE} steps, 10 is usual")
        for name in ("threshold", "proposal_weight"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise invalid(f"{name} is {share}; allowed: 0 to 1")

    def sizes(self, window: int) -> tuple[int, int]:
        """`short_side` and `stride` in pixels, which must fit a window, with their defaults."""
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
    """The label of each pixel, and the mean probability of each label's pixels, 0 without any."""

    mask: NDArray[np.uint16]  # [H, W], of the turned image; C is the background, if any
    # [C], or [C + 1] with the background, whose probability is one minus the best label's
    scores: NDArray[np.float32]


class MaskTally:
    """Collects a `ScoredMask`, in which index `labels` is the background, if there is one."""

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
        """The mask, reshaped to `shape` if given, and its scores."""
        scores = np.asarray(self._sums / np.maximum(self._pixels, 1), np.float32)
        return ScoredMask(self._mask if shape is None else self._mask.reshape(shape), scores)


def encode_windows(windows: Windows[S], encode: Encode) -> S:
    """Run a segmentation with an encoder function, such as a model in torch."""
    try:
        batch = next(windows)
        while True:
            batch = windows.send(encode(batch))
    except StopIteration as done:
        result: S = done.value
        return result


def check_size(
    loaded: LoadedRelease, size: tuple[int, int], labels: int, options: SegmentOptions
) -> None:
    """Refuse, before decoding, an image that takes too many windows, or too many labels for it."""
    window = loaded.preprocess.size[0]
    short_side, stride = options.sizes(window)
    width, height = _working(loaded, short_side).resized(*size)
    windows = len(window_starts(height, window, stride)) * len(window_starts(width, window, stride))
    if windows > MAX_WINDOWS:
        raise invalid(
            f"an image of {size[0]} x {size[1]}, resized to {width} x {height}, takes"
            f" {windows} windows of {window} pixels; at most {MAX_WINDOWS} are allowed: give a"
            " smaller short_side, a larger stride, or the image in parts"
        )
    if loaded.release.dense:
        grid = loaded.release.dense.grid
        _check_values(windows * grid**2, labels, "at a smaller short_side")
    if options.refine:
        _check_values(height * width, labels, "to refine; or leave refine out")


def segment_densely(
    loaded: LoadedRelease,
    image: Image.Image,
    embeds: NDArray[np.float32],
    options: SegmentOptions = USUAL,
    *,
    rows: int,
    cancelled: Cancelled | None = None,
) -> Windows[ScoredMask]:
    """Label each pixel of an image with the cosines of patches with labels, whose text embeddings,
    float32 [C, D], have unit length; yields batches of up to `rows` windows, and is sent their
    patches' embeddings.
    """
    check = partial(check_cancelled, cancelled)
    finite(embeds)

    # Resize to the working image, and place the windows.
    size = image.size
    window = loaded.preprocess.size[0]
    short_side, stride = options.sizes(window)
    try:
        working = np.asarray(_working(loaded, short_side).resize(image).convert("RGB"))
    except (OSError, ValueError) as error:  # by Pillow, for modes that it cannot resize
        raise TaskError(INVALID_IMAGE, f"the image cannot be segmented ({error})") from None
    del image
    height, width = working.shape[:2]
    tops = window_starts(height, window, stride)
    lefts = window_starts(width, window, stride)

    # Compute the cosines of all patches, and map them to the image's pixels, with refinement on the
    # working image.
    values = yield from _patch_cosines(working, window, tops, lefts, embeds, rows, check)
    grid = len(values) // len(tops)
    down = Axis(size[1], height, window, grid, tuple(tops))
    across = Axis(size[0], width, window, grid, tuple(lefts))
    if options.refine:
        maps = np.empty((len(embeds), height, width), np.float32)
        for (vertical, horizontal), part in upsampled(
            values, replace(down, pixels=height), replace(across, pixels=width)
        ):
            check()
            maps[:, vertical, horizontal] = part
        refine(maps, working, options.refine, check)
        values = maps.transpose(1, 0, 2)
        down, across = (
            Axis(a.pixels, a.working, a.working, a.working, (0,)) for a in (down, across)
        )

    # Take the best label of each pixel; a bias needs the scale that it was trained with.
    bias = loaded.release.logit_bias
    scale = PATCH_SCALE if bias is None else loaded.release.logit_scale
    has_background = options.threshold is not None
    tally = MaskTally((size[1], size[0]), len(embeds), has_background, options.threshold)
    for where, part in upsampled(values, down, across):
        check()
        best, probabilities = best_class(part.reshape(len(embeds), -1), scale, bias)
        tally.put(where, best.reshape(part.shape[1:]), probabilities.reshape(part.shape[1:]))
    return tally.result()


def _patch_cosines(
    working: NDArray[np.uint8],
    window: int,
    tops: list[int],
    lefts: list[int],
    embeds: NDArray[np.float32],
    rows: int,
    check: Callable[[], None],
) -> Windows[NDArray[np.float32]]:
    """Compute the cosines of the labels with all patches, which lie side by side: [windows down x
    patches of one, C, windows across x patches of one].
    """
    corners = [(row, column) for row in range(len(tops)) for column in range(len(lefts))]
    values = np.empty(0, np.float32)
    grid = 0
    for start in range(0, len(corners), rows):
        check()
        batch = corners[start : start + rows]
        views = [
            working[tops[i] : tops[i] + window, lefts[j] : lefts[j] + window] for i, j in batch
        ]
        patches = finite((yield np.stack(views)))
        if not start:
            grid = patches.shape[1]
            _check_values(len(corners) * grid * grid, len(embeds), "at a smaller short_side")
            values = np.empty((len(tops), grid, len(embeds), len(lefts), grid), np.float32)
        for (row, column), patch in zip(batch, patches, strict=True):
            cosines = embeds @ patch.reshape(grid * grid, -1).T
            values[row, :, :, column] = cosines.reshape(-1, grid, grid).transpose(1, 0, 2)
    return values.reshape(len(tops) * grid, len(embeds), len(lefts) * grid)


def _working(loaded: LoadedRelease, short_side: int) -> Preprocess:
    """The preprocessing whose resize makes the working image."""
    return replace(loaded.preprocess, size=(short_side, short_side), resize_mode="shortest")


def _check_values(places: int, labels: int, way_out: str) -> None:
    if places * labels > MAX_VALUES:
        most = MAX_VALUES // places
        raise invalid(
            f"{labels} labels are too many for this image; at most {most} are allowed {way_out}"
        )


def refine(
    maps: NDArray[np.float32],
    image: NDArray[np.uint8],
    steps: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Replace, `steps` times, each pixel's scores in `maps`, float32 [C, h, w], by the mean of its
    neighbours', weighted by similarity of colour in `image`, uint8 [h, w, 3].

    The weights are softmax over the neighbours of -|I_i - I_j| / (0.1 s_i), mean over the channels,
    where s_i is the standard deviation of the colours around pixel i (Araslanov & Roth,
    "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.3). `check` is
    called after each map, and may raise.
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

    # Compute the weights, float32 [neighbours, h, w], with sum one at each pixel.
    weights = np.zeros((len(views), height, width), np.float32)
    for channel in np.moveaxis(image, 2, 0).astype(np.float32) / 255:
        padded = np.pad(channel, border, mode="edge")
        # The neighbours of each pixel, and the pixel itself once for each ring.
        around = [padded[view] for view in views] + [channel] * len(DILATIONS)
        mean = sum(around[1:], around[0]) / len(around)
        deviation = np.sqrt(sum((values - mean) ** 2 for values in around) / (len(around) - 1))
        for weight, view in zip(weights, views, strict=True):
            weight -= np.abs(channel - padded[view]) / (1e-8 + 0.1 * deviation) / 3
    weights -= weights.max(0)
    np.exp(weights, out=weights)
    weights /= weights.sum(0)

    product = np.empty((height, width), np.float32)
    # Map by map: a map, its weights and the product stay in the cache.
    for scores in maps:
        for _ in range(steps):
            padded = np.pad(scores, border, mode="edge")
            scores[:] = 0
            for weight, view in zip(weights, views, strict=True):
                scores += np.multiply(weight, padded[view], out=product)
        check()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows that cover an axis; the last window ends at the border."""
    return [*range(0, length - window, stride), length - window]


@dataclass(frozen=True)
class Axis:
    """The linear map from patches to pixels along one axis of an image.

    All steps from patches to pixels are linear and separable: patches are upsampled to their
    window, overlapping windows are averaged, and the working image is resized to the image's size;
    both resizes are bilinear, as in torch with `align_corners=False`. So no map of the working
    image is kept in memory.
    """

    pixels: int  # of the image itself
    working: int  # pixels of the working image, which the windows cover
    window: int  # pixels of a window
    grid: int  # patches of a window
    starts: tuple[int, ...]  # first working pixel of each window

    def weights(self, first: int, last: int) -> tuple[slice, NDArray[np.float32]]:
        """The patches that count for pixels first..last-1, and their weights, [last - first, K]."""
        low, high, share = _between(np.arange(first, last), self.pixels, self.working)
        share = share[:, None]
        total = self._of_working(low) * (1 - share) + self._of_working(high) * share
        used = np.flatnonzero(total.any(0))
        which = slice(int(used[0]), int(used[-1]) + 1)
        return which, np.ascontiguousarray(total[:, which], np.float32)

    def _of_working(self, positions: NDArray[np.intp]) -> NDArray[np.float64]:
        """Weights [n, windows x grid] of working pixels: the mean over a pixel's windows."""
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
    """Upsample patches' values [k, C, l] to pixels; yields slices and values of blocks."""
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


@lru_cache(maxsize=8)  # the bands of four sizes of images, some megabytes at most
def _bands(axis: Axis, step: int) -> tuple[tuple[slice, slice, NDArray[np.float32]], ...]:
    """The image's pixels in bands of at most `step`, with the patches and weights of each."""
    bands = []
    for block in range(0, axis.pixels, BAND):
        end = min(block + BAND, axis.pixels)
        for first in range(block, end, step):
            last = min(first + step, end)
            bands.append((slice(first, last), *axis.weights(first, last)))
    return tuple(bands)


def _between(
    positions: NDArray[np.intp], size: int, source: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """The two source pixels of each pixel of a resized axis, and the fraction of the second."""
    at: NDArray[np.float64] = np.clip((positions + 0.5) * source / size - 0.5, 0, source - 1)
    low = np.floor(at).astype(np.intp)
    return low, np.minimum(low + 1, source - 1), at - low
