"""Dense segmentation: windows over an image, the cosines of their patches with labels, and from
these to pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.errors import Cancelled, check_cancelled, invalid
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.contract.probabilities import best_class
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.tasks.masks import (
    USUAL,
    MaskTally,
    ScoredMask,
    SegmentOptions,
    Windows,
    check_label_embeddings,
    finite,
)
from radapter_serve.tasks.windows import Axis, upsampled, window_starts

# of the softmax over a pixel's cosines: SCLIP's (Wang et al., ECCV 2024); patches are less sure
PATCH_SCALE = 40.0
MAX_WINDOWS = 500
MAX_VALUES = 2**27  # cosines of one image in memory, half a gigabyte
# Pixels between a pixel and its neighbours; one 3 x 3 ring each. NACLIP's.
DILATIONS = (8, 16)
_RING = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


@dataclass(frozen=True)
class DenseSegmenter:
    """Labels each pixel of an image by the cosines of patches with labels.

    The image is resized to a working image, in which windows overlap; cosines are upsampled
    bilinearly to their window, averaged over the windows of a pixel, refined if wished, and
    upsampled to the image's own size, where softmax(40 cos) gives the probabilities; of a release
    with a bias, the sigmoid of each label, as in `classify`.
    """

    preprocess: Preprocess  # its size is a window's, its interpolation makes the working image
    max_batch_size: int
    logit_scale: float = PATCH_SCALE
    logit_bias: float | None = None  # of a model that was trained with a sigmoid loss
    grid: int | None = None  # patches on a window's side; None: only the encoder knows

    @classmethod
    def of(cls, loaded: LoadedRelease) -> DenseSegmenter:
        """As a release says."""
        release = loaded.release
        return cls(
            loaded.preprocess,
            release.max_batch_size,
            release.logit_scale,
            release.logit_bias,
            release.dense["grid"] if release.dense else None,
        )

    def check_size(self, size: tuple[int, int], labels: int, options: SegmentOptions) -> None:
        """Raise a `TaskError`, before anything is decoded, for an image that is too long and thin,
        or too many labels, for the windows that it takes.
        """
        window = self.preprocess.size[0]
        short_side, stride = options.sizes(window)
        width, height = self._shortest(short_side).resized(*size)
        windows = len(window_starts(height, window, stride)) * len(
            window_starts(width, window, stride)
        )
        if windows > MAX_WINDOWS:
            raise invalid(
                f"an image of {size[0]} x {size[1]}, resized to {width} x {height}, takes"
                f" {windows} windows of {window} pixels; at most {MAX_WINDOWS} are allowed: give a"
                " smaller short_side, a larger stride, or the image in parts"
            )
        if self.grid is not None:
            _check_values(windows * self.grid**2, labels, "at a smaller short_side")
        if options.refine:
            _check_values(height * width, labels, "to refine; or leave refine out")

    def segment(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        options: SegmentOptions = USUAL,
        *,
        cancelled: Cancelled | None = None,
    ) -> Windows[ScoredMask]:
        """Segment an image by labels' text embeddings of unit length, float32 [C, D]; yields
        batches of windows, and is sent their patches.

        The image, of any mode, is let go of before the first batch is encoded. Raises a `TaskError`
        for options that don't fit, too much to compute, and a caller who has left.
        """
        check = partial(check_cancelled, cancelled)
        self.check_size(image.size, len(embeds), options)
        check_label_embeddings(embeds)

        # The working image, and where windows are on it.
        size = image.size
        window = self.preprocess.size[0]
        short_side, stride = options.sizes(window)
        working = np.asarray(self._shortest(short_side).resize(image).convert("RGB"))
        del image
        height, width = working.shape[:2]
        tops = window_starts(height, window, stride)
        lefts = window_starts(width, window, stride)

        # The cosines of their patches, and from these to the image's own pixels.
        values = yield from self._cosines(working, tops, lefts, embeds, check)
        grid = values.shape[0] // len(tops)
        rows = Axis(size[1], height, window, grid, tuple(tops))
        columns = Axis(size[0], width, window, grid, tuple(lefts))
        if options.refine:
            maps = np.empty((len(embeds), height, width), np.float32)
            for (vertical, horizontal), part in upsampled(
                values, replace(rows, pixels=height), replace(columns, pixels=width)
            ):
                check()
                maps[:, vertical, horizontal] = part
            refine(maps, working, options.refine, check)
            values = maps.transpose(1, 0, 2)
            rows, columns = (
                Axis(a.pixels, a.working, a.working, a.working, (0,)) for a in (rows, columns)
            )

        # The best label of each pixel; a bias belongs to the scale that it was trained with.
        scale = PATCH_SCALE if self.logit_bias is None else self.logit_scale
        tally = MaskTally(
            (size[1], size[0]),
            len(embeds),
            options.threshold is not None,
            options.threshold,
        )
        for where, cosines in upsampled(values, rows, columns):
            check()
            shape = cosines.shape[1:]
            flat = cosines.reshape(len(embeds), -1)
            best, probabilities = best_class(flat, scale, self.logit_bias)
            tally.put(where, best.reshape(shape), probabilities.reshape(shape))
        return tally.result()

    def _shortest(self, short_side: int) -> Preprocess:
        """The preprocessing whose resize makes the working image."""
        return replace(self.preprocess, size=(short_side, short_side), resize_mode="shortest")

    def _cosines(
        self,
        working: NDArray[np.uint8],
        tops: Sequence[int],
        lefts: Sequence[int],
        embeds: NDArray[np.float32],
        check: Callable[[], None],
    ) -> Windows[NDArray[np.float32]]:
        """The cosines of all windows' patches side by side, float32 [windows down x g, C, windows
        across x g].
        """
        size = self.preprocess.size[0]
        step = self.max_batch_size
        corners = [(row, column) for row in range(len(tops)) for column in range(len(lefts))]
        values = np.empty(0, np.float32)
        for start in range(0, len(corners), step):
            check()
            batch = corners[start : start + step]
            views = [
                working[tops[i] : tops[i] + size, lefts[j] : lefts[j] + size] for i, j in batch
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
    neighbours', weighted by likeness of colour in `image`, uint8 [h, w, 3].

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
