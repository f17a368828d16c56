"""Dense segmentation: windows over an image, the cosines of their patches with labels, and from these to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.inputs.alpha import Encode
from radapter_serve.inputs.errors import Cancelled, check_cancelled, invalid
from radapter_serve.inputs.preprocess import Preprocess
from radapter_serve.inputs.probabilities import class_probabilities
from radapter_serve.tasks.refine import refine
from radapter_serve.tasks.scored_mask import MaskTally, ScoredMask, check_label_embeddings, finite
from radapter_serve.tasks.segment_options import SegmentOptions
from radapter_serve.tasks.windows import Axis, upsampled, window_starts

PATCH_SCALE = 40.0  # of the softmax over a pixel's cosines: SCLIP's (Wang et al., ECCV 2024); patches are less sure
MAX_WINDOWS = 500
MAX_VALUES = 2**27  # cosines of one image in memory, half a gigabyte


@dataclass(frozen=True)
class DenseSegmenter:
    """Labels each pixel by the cosines of patches with labels; `Segmenter` says what the fields are."""

    encode_patches: Encode
    preprocess: Preprocess
    max_batch_size: int
    scale: float = PATCH_SCALE
    bias: float | None = None

    def __call__(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        options: SegmentOptions,
        cancelled: Cancelled | None = None,
    ) -> ScoredMask:
        """As `Segmenter.dense`."""
        check = partial(check_cancelled, cancelled)
        check_label_embeddings(embeds)
        working, tops, lefts = self._windows(image, options)
        values = self._cosines(working, tops, lefts, embeds, check)
        (height, width), size, grid = working.shape[:2], self.preprocess.size[0], values.shape[0] // len(tops)
        rows = Axis(image.height, height, size, grid, tuple(tops))
        columns = Axis(image.width, width, size, grid, tuple(lefts))
        if options.refine:
            _check_values(height * width, len(embeds), "to refine; or leave refine out")
            maps = np.empty((height, width, len(embeds)), np.float32)
            for where, part in upsampled(values, replace(rows, pixels=height), replace(columns, pixels=width)):
                check()
                maps[where] = part
            refine(maps, working, options.refine, check)
            values = maps
            rows, columns = (Axis(a.pixels, a.working, a.working, a.working, (0,)) for a in (rows, columns))
        tally = MaskTally((image.height, image.width), len(embeds), options.threshold is not None, options.threshold)
        for where, cosines in upsampled(values, rows, columns):
            check()
            best = cosines.argmax(-1)[..., None]
            probabilities = class_probabilities(cosines, self.scale, self.bias)
            tally.put(where, best[..., 0], np.take_along_axis(probabilities, best, -1)[..., 0])
        return tally.result()

    def _windows(self, image: Image.Image, options: SegmentOptions) -> tuple[NDArray[np.uint8], list[int], list[int]]:
        """The working image, uint8 [h, w, 3], and the first rows and the first columns of its windows."""
        size = self.preprocess.size[0]
        short_side, stride = options.sizes(size)
        shortest = replace(self.preprocess, size=(short_side, short_side), resize_mode="shortest")
        working = np.asarray(shortest.resize(image).convert("RGB"))
        height, width = working.shape[:2]
        tops, lefts = window_starts(height, size, stride), window_starts(width, size, stride)
        if len(tops) * len(lefts) > MAX_WINDOWS:
            raise invalid(
                f"an image of {image.width} x {image.height}, resized to {width} x {height}, takes "
                f"{len(tops) * len(lefts)} windows of {size} pixels; at most {MAX_WINDOWS} are allowed: "
                "give a smaller short_side, a larger stride, or the image in parts"
            )
        return working, tops, lefts

    def _cosines(
        self,
        working: NDArray[np.uint8],
        tops: Sequence[int],
        lefts: Sequence[int],
        embeds: NDArray[np.float32],
        check: Callable[[], None],
    ) -> NDArray[np.float32]:
        """The cosines of all windows' patches side by side, float32 [windows down x g, windows across x g, C]."""
        size, step = self.preprocess.size[0], self.max_batch_size
        corners = [(row, column) for row in range(len(tops)) for column in range(len(lefts))]
        values = np.empty(0, np.float32)
        for start in range(0, len(corners), step):
            check()
            batch = corners[start : start + step]
            views = [working[tops[i] : tops[i] + size, lefts[j] : lefts[j] + size] for i, j in batch]
            patches = finite(self.encode_patches(np.stack(views)))
            if not start:
                grid = patches.shape[1]
                _check_values(len(corners) * grid * grid, len(embeds), "at a smaller short_side")
                values = np.empty((len(tops), grid, len(lefts), grid, len(embeds)), np.float32)
            for (row, column), patch in zip(batch, patches, strict=True):
                values[row, :, column] = patch @ embeds.T
        return values.reshape(len(tops) * grid, len(lefts) * grid, -1)


def _check_values(places: int, labels: int, way_out: str) -> None:
    if places * labels > MAX_VALUES:
        most = MAX_VALUES // places
        raise invalid(f"{labels} labels are too many for this image; at most {most} are allowed {way_out}")
