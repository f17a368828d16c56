"""Dense segmentation: windows over an image, the cosines of their patches with labels, and from
these to pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.alpha import Encode
from radapter_serve.contract.errors import (
    NO_PATCH_ENCODER,
    Cancelled,
    TaskError,
    check_cancelled,
    invalid,
)
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.contract.probabilities import best_class
from radapter_serve.release.release import Release
from radapter_serve.tasks.refine import refine
from radapter_serve.tasks.scored_mask import MaskTally, ScoredMask, check_label_embeddings, finite
from radapter_serve.tasks.segment_options import USUAL, SegmentOptions
from radapter_serve.tasks.windows import Axis, upsampled, window_starts

S = TypeVar("S")
# Yields images for an encoder, uint8 [B, S, S, 3], and is sent what it makes of them.
Windows: TypeAlias = Generator[NDArray[np.uint8], NDArray[np.float32], S]

# of the softmax over a pixel's cosines: SCLIP's (Wang et al., ECCV 2024); patches are less sure
PATCH_SCALE = 40.0
MAX_WINDOWS = 500
MAX_VALUES = 2**27  # cosines of one image in memory, half a gigabyte


@dataclass(frozen=True)
class DenseSegmenter:
    """Labels each pixel of an image by the cosines of patches with labels.

    The image is resized to a working image, in which windows overlap; cosines are upsampled
    bilinearly to their window, averaged over the windows of a pixel, refined if wished, and
    upsampled to the image's own size, where softmax(40 cos) gives the probabilities; of a release
    with a bias, the sigmoid of each label, as in `classify`.

    Args:
        encode_patches: uint8 [B, S, S, 3] -> float32 [B, g, g, D] of unit length, or None where
            there is none.
        preprocess: says what S is; its interpolation makes the working image.
        max_batch_size: rows that the encoder takes at most.
        logit_scale, logit_bias: of a release whose model was trained with a sigmoid loss.
        grid: g, or None where only the encoder tells.
    """

    encode_patches: Encode | None
    preprocess: Preprocess
    max_batch_size: int
    logit_scale: float = PATCH_SCALE
    logit_bias: float | None = None
    grid: int | None = None

    @classmethod
    def of_release(cls, release: Release, encode_patches: Encode | None = None) -> DenseSegmenter:
        """As a release says."""
        preprocess = Preprocess.from_dict(release.preprocess)
        return cls(
            encode_patches,
            preprocess,
            release.max_batch_size,
            release.logit_scale,
            release.logit_bias,
            release.dense["grid"] if release.dense else None,
        )

    def check(self, options: SegmentOptions, *, has_patches: bool) -> None:
        """Raise a `TaskError` where there is no patch encoder, or the options do not fit."""
        if not has_patches:
            raise TaskError(
                NO_PATCH_ENCODER,
                "this release has no patch_encoder; export with radapter-export --dense naclip, or"
                " send proposals",
            )
        options.sizes(self.preprocess.size[0])

    def check_size(self, size: tuple[int, int], labels: int, options: SegmentOptions) -> None:
        """Refuse what takes too much, before anything is decoded or encoded.

        Args:
            size: of the image in pixels, one side and the other.
            labels: how many.
            options: how.

        Raises:
            TaskError: an image too long and thin, or too many labels, for the windows it takes.
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

    def working(self, image: Image.Image, options: SegmentOptions) -> NDArray[np.uint8]:
        """The image that windows go over, uint8 [h, w, 3].

        Args:
            image: as `decode` gives it, any mode.
            options: how.
        """
        short_side, _ = options.sizes(self.preprocess.size[0])
        return np.asarray(self._shortest(short_side).resize(image).convert("RGB"))

    def __call__(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        options: SegmentOptions = USUAL,
        *,
        cancelled: Cancelled | None = None,
    ) -> ScoredMask:
        """Segment an image.

        Args:
            image: as `decode` gives it, any mode.
            embeds: float32 [C, D], the labels' text embeddings of unit length.
            options: how.
            cancelled: asked between batches of windows; where it says yes, nobody waits for the
                rest.

        Raises:
            TaskError: no patch encoder; options that do not fit; an image too long and thin, or too
                many labels, for the windows it takes; cancelled.
        """
        self.check(options, has_patches=self.encode_patches is not None)
        self.check_size(image.size, len(embeds), options)
        working = self.working(image, options)
        assert self.encode_patches is not None
        return driven(
            self.segment(image.size, working, embeds, options, cancelled=cancelled),
            self.encode_patches,
        )

    def segment(
        self,
        size: tuple[int, int],
        working: NDArray[np.uint8],
        embeds: NDArray[np.float32],
        options: SegmentOptions,
        *,
        cancelled: Cancelled | None = None,
    ) -> Windows[ScoredMask]:
        """Segment an image that `check_size` lets through; yields batches of windows, and is sent
        their patches.

        Args:
            size: width and height of the image.
            working: what `working` makes of it.
            embeds, options, cancelled: as for the call of the whole.

        Raises:
            TaskError: as the call of the whole does.
        """
        check = partial(check_cancelled, cancelled)
        check_label_embeddings(embeds)
        height, width = working.shape[:2]
        window = self.preprocess.size[0]
        _, stride = options.sizes(window)
        tops = window_starts(height, window, stride)
        lefts = window_starts(width, window, stride)
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
        # A bias belongs to its own scale.
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
        """What makes the working image."""
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


def driven(windows: Windows[S], encode: Encode) -> S:
    """What `windows` returns, by an encoder."""
    try:
        batch = next(windows)
        while True:
            batch = windows.send(encode(batch))
    except StopIteration as done:
        result: S = done.value
        return result


def _check_values(places: int, labels: int, way_out: str) -> None:
    if places * labels > MAX_VALUES:
        most = MAX_VALUES // places
        raise invalid(
            f"{labels} labels are too many for this image; at most {most} are allowed {way_out}"
        )
