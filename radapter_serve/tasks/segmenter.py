"""Images to masks of labels given as text embeddings: by dense patches, or by classifying proposals (OVSeg)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.inputs.alpha import Encode
from radapter_serve.inputs.errors import CANCELLED, ENCODER_FAILED, INVALID_ARGUMENT, NO_PATCH_ENCODER, TaskError
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.inputs.preprocess import Preprocess
from radapter_serve.inputs.probabilities import class_probabilities
from radapter_serve.release.release import Release
from radapter_serve.tasks.refine import refine
from radapter_serve.tasks.windows import BLOCK, Axis, upsampled, window_starts

Cancelled = Callable[[], bool]

PATCH_SCALE = 40.0  # of the softmax over a pixel's cosines: SCLIP's (Wang et al., ECCV 2024); patches are less sure
BINARY = 102  # 0.4 of 255: a proposal's crop holds the pixels above it (Liang et al., OVSeg, CVPR 2023)
MAX_LABELS = 65_534  # the background's index and every label's fit into uint16
MAX_WINDOWS = 500
MAX_REFINE = 100
MAX_VALUES = 2**27  # cosines of one image in memory, half a gigabyte


@dataclass(frozen=True)
class SegmentOptions:
    """How an image is segmented.

    Args:
        short_side: shorter side in pixels of the working image that windows go over, at least a window. None: 1.5
            windows (336 for 224, as SCLIP has it), so that each pixel is seen in two or more contexts and objects
            that one view of the whole image shows too small get more patches.
        stride: pixels from one window to the next, from 1 to a window's size. None: half a window.
        refine: steps of pixel-adaptive refinement of the cosines, 0 for none; 10 is usual.
        threshold: probability in [0, 1] below which a pixel is background. None: only pixels that no proposal covers
            are; without proposals there is no background.
        proposal_weight: w in [0, 1] of the fusion p = p_proposal^(1-w) p_clip^w, for proposals that bring scores.

    Raises:
        TaskError: a value out of its range.
    """

    short_side: int | None = None
    stride: int | None = None
    refine: int = 0
    threshold: float | None = None
    proposal_weight: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (("short_side", self.short_side), ("stride", self.stride)):
            if value is not None and value < 1:
                raise TaskError(INVALID_ARGUMENT, f"{name} is {value}; a number of pixels, 1 or more")
        if not 0 <= self.refine <= MAX_REFINE:
            raise TaskError(INVALID_ARGUMENT, f"refine is {self.refine}; 0 (none) to {MAX_REFINE} steps, 10 is usual")
        for name, share in (("threshold", self.threshold), ("proposal_weight", self.proposal_weight)):
            if share is not None and not 0 <= share <= 1:
                raise TaskError(INVALID_ARGUMENT, f"{name} is {share}; allowed: 0 to 1")

    def sizes(self, window: int) -> tuple[int, int]:
        """`short_side` and `stride`, with windows of this many pixels where they are None."""
        short_side = window + window // 2 if self.short_side is None else self.short_side
        return short_side, max(1, window // 2) if self.stride is None else self.stride


@dataclass
class Segmented:
    """A segmented image.

    Args:
        mask: uint16 [H, W], index of each pixel's label; C is the background, with a threshold or with proposals. H and
            W are those of the image as it was given: of a decoded file, after it was turned by its EXIF orientation.
        scores: float32 [C], or [C + 1] with the background: the mean probability over the pixels that got the label
            (of background pixels, one minus their best label's), 0 where none did.
    """

    mask: NDArray[np.uint16]
    scores: NDArray[np.float32]


class Segmenter:
    """Segments images with the encoders of one release.

    Args:
        encode_patches: uint8 [B, S, S, 3] -> float32 [B, g, g, D] of unit length, or None where there is none.
        encode_images: uint8 [B, S, S, 3] -> float32 [B, D] of unit length, or None; for proposals.
        preprocess: makes the input of `encode_images`, S x S; its interpolation also makes the working image.
        crop: how a mask is shown to `encode_images`.
        logit_scale: of the release, for proposals.
        max_batch_size: rows that an encoder takes at most.
        logit_bias: of a release whose model was trained with a sigmoid loss.
    """

    def __init__(
        self,
        encode_patches: Encode | None,
        encode_images: Encode | None,
        preprocess: Preprocess,
        crop: MaskCrop,
        logit_scale: float,
        max_batch_size: int,
        logit_bias: float | None = None,
    ) -> None:
        self._encode_patches, self._encode_images = encode_patches, encode_images
        self._preprocess, self._crop, self._size = preprocess, crop, preprocess.size[0]
        self._logit_scale, self._logit_bias, self._max_batch_size = logit_scale, logit_bias, max_batch_size

    @property
    def exif_orientation(self) -> bool:
        """Whether images are to be turned as their EXIF says."""
        return self._preprocess.exif_orientation

    @classmethod
    def of_release(cls, release: Release, encode_patches: Encode | None, encode_images: Encode | None) -> Segmenter:
        """As a release says."""
        return cls(
            encode_patches,
            encode_images,
            Preprocess.from_dict(release.preprocess),
            MaskCrop.from_dict(release.crop),
            release.logit_scale,
            release.max_batch_size,
            release.logit_bias,
        )

    def dense(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        options: SegmentOptions = SegmentOptions(),
        *,
        cancelled: Cancelled | None = None,
    ) -> Segmented:
        """Label each pixel by the cosines of patches with labels.

        The image is resized to a working image, in which windows overlap; cosines are upsampled bilinearly to their
        window, averaged over the windows of a pixel, refined if wished, and upsampled to the image's own size, where
        softmax(40 cos) gives the probabilities; of a release with a bias, the sigmoid of each label, as in `classify`.

        Args:
            image: as `decode` gives it, any mode.
            embeds: float32 [C, D], the labels' text embeddings of unit length.
            options: how.
            cancelled: asked between batches of windows; where it says yes, nobody waits for the rest.

        Raises:
            TaskError: no patch encoder; options that do not fit; an image too long and thin, or too many labels, for
                the windows it takes; cancelled.
        """
        short_side, stride = self.check_dense(options)
        _check_labels(embeds)
        size = self._size
        shortest = replace(self._preprocess, size=(short_side, short_side), resize_mode="shortest")
        working = np.asarray(shortest.resize(image).convert("RGB"))
        height, width = working.shape[:2]
        tops, lefts = window_starts(height, size, stride), window_starts(width, size, stride)
        if len(tops) * len(lefts) > MAX_WINDOWS:
            raise TaskError(
                INVALID_ARGUMENT,
                f"an image of {image.width} x {image.height}, resized to {width} x {height}, takes "
                f"{len(tops) * len(lefts)} windows of {size} pixels; at most {MAX_WINDOWS} are allowed: "
                "give a smaller short_side, a larger stride, or the image in parts",
            )
        check = _checker(cancelled)
        values = self._cosines(working, tops, lefts, embeds, check)
        grid = values.shape[0] // len(tops)
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
        scale = PATCH_SCALE if self._logit_bias is None else self._logit_scale  # a bias belongs to its own scale
        tally = _Tally((image.height, image.width), len(embeds), options.threshold is not None, options.threshold)
        for where, cosines in upsampled(values, rows, columns):
            check()
            best = cosines.argmax(-1)[..., None]
            probabilities = class_probabilities(cosines, scale, self._logit_bias)
            tally.put(where, best[..., 0], np.take_along_axis(probabilities, best, -1)[..., 0])
        return tally.result()

    def check_dense(self, options: SegmentOptions) -> tuple[int, int]:
        """The short side and the stride of dense segmentation, in pixels.

        Raises:
            TaskError: no patch encoder, or options that do not fit.
        """
        if self._encode_patches is None:
            raise TaskError(
                NO_PATCH_ENCODER,
                "this release has no patch_encoder; export with radapter-export --dense naclip, or send proposals",
            )
        size = self._size
        short_side, stride = options.sizes(size)
        if short_side < size:
            raise TaskError(INVALID_ARGUMENT, f"short_side is {short_side}; at least {size}, the size of a window")
        if stride > size:
            raise TaskError(INVALID_ARGUMENT, f"stride is {stride}; 1 to {size}, the size of a window")
        return short_side, stride

    def from_proposals(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        masks: NDArray[np.uint8],
        scores: NDArray[np.float32] | None = None,
        options: SegmentOptions = SegmentOptions(),
        *,
        cancelled: Cancelled | None = None,
    ) -> Segmented:
        """Label each pixel by the classes of the masks that cover it, as OVSeg does.

        Each mask's crop is classified as `classify` does it; with scores, the class probabilities of mask q are
        p_q = scores_q^(1-w) p_clip^w. A pixel gets the best label of sum_q p_q mask_q, divided by sum_q mask_q where
        that is above one (which changes no label and keeps it a probability). A pixel without any mask is background,
        with a threshold or without.

        Args:
            image: as `decode` gives it, any mode.
            embeds: float32 [C, D], the labels' text embeddings of unit length.
            masks: uint8 [N, H, W], the probability of each mask, 0 to 255; crops hold what is above 0.4. Masks that
                hold nothing are left out.
            scores: float32 [N, C], the proposals' own class probabilities, or None.
            options: `threshold` and `proposal_weight` count here.
            cancelled: asked between batches of crops.

        Raises:
            TaskError: masks or scores that do not fit, or hold nothing; cancelled.
        """
        _check_labels(embeds)
        _check_proposals(masks, scores, image, len(embeds))
        check = _checker(cancelled)
        used = [index for index, mask in enumerate(masks) if mask.max() > BINARY]
        if not used:
            raise TaskError(INVALID_ARGUMENT, f"all {len(masks)} proposals are empty: no value is above {BINARY}")
        classes = self._classify((self._crop(image, masks[index] > BINARY) for index in used), embeds, check)
        if scores is not None:
            weight = options.proposal_weight
            classes = scores[used] ** np.float32(1 - weight) * classes ** np.float32(weight)
        flat = masks.reshape(len(masks), -1)
        tally = _Tally((flat.shape[1],), len(embeds), True, options.threshold)
        step = max(1, BLOCK // max(len(masks), len(embeds)))
        for where in (slice(start, start + step) for start in range(0, flat.shape[1], step)):
            check()
            part = flat[:, where][used]
            part = part[present := part.any(1)]
            inside = part.astype(np.float32) / 255
            sums, total = inside.T @ classes[present], inside.sum(0)
            sums /= np.maximum(total, 1)[:, None]
            best = sums.argmax(1)
            probabilities = np.take_along_axis(sums, best[:, None], 1)[:, 0]
            best[total == 0] = len(embeds)
            tally.put(where, best, probabilities)
        return tally.result(masks.shape[1:])

    def _cosines(
        self,
        working: NDArray[np.uint8],
        tops: Sequence[int],
        lefts: Sequence[int],
        embeds: NDArray[np.float32],
        check: Callable[[], None],
    ) -> NDArray[np.float32]:
        """The cosines of all windows' patches side by side, float32 [windows down x g, windows across x g, C]."""
        assert self._encode_patches is not None
        corners = [(row, column) for row in range(len(tops)) for column in range(len(lefts))]
        values = np.empty(0, np.float32)
        for start in range(0, len(corners), self._max_batch_size):
            check()
            batch = corners[start : start + self._max_batch_size]
            views = [working[tops[i] : tops[i] + self._size, lefts[j] : lefts[j] + self._size] for i, j in batch]
            patches = _finite(self._encode_patches(np.stack(views)))
            if not start:
                grid = patches.shape[1]
                _check_values(len(corners) * grid * grid, len(embeds), "at a smaller short_side")
                values = np.empty((len(tops), grid, len(lefts), grid, len(embeds)), np.float32)
            for (row, column), patch in zip(batch, patches, strict=True):
                values[row, :, column] = patch @ embeds.T
        return values.reshape(len(tops) * grid, len(lefts) * grid, -1)

    def _classify(
        self, images: Iterator[Image.Image], embeds: NDArray[np.float32], check: Callable[[], None]
    ) -> NDArray[np.float32]:
        """Class probabilities of images, float32 [N, C]."""
        assert self._encode_images is not None
        parts = []
        while batch := [self._preprocess(image) for image in itertools.islice(images, self._max_batch_size)]:
            check()
            cosines = _finite(self._encode_images(np.stack(batch))) @ embeds.T
            parts.append(class_probabilities(cosines, self._logit_scale, self._logit_bias))
        return np.concatenate(parts)


class _Tally:
    """The mask as it fills, and what the scores need."""

    def __init__(self, shape: tuple[int, ...], labels: int, background: bool, threshold: float | None) -> None:
        self._mask = np.empty(shape, np.uint16)
        self._labels, self._threshold = labels, threshold
        self._sums = np.zeros(labels + background)
        self._pixels = np.zeros(len(self._sums), np.int64)

    def put(self, where: Any, best: NDArray[np.intp], probabilities: NDArray[np.float32]) -> None:
        """Label the pixels `where`; `best` may hold the background already."""
        if self._threshold is not None:
            best = np.where(probabilities < self._threshold, self._labels, best)
        probabilities = np.where(best == self._labels, 1 - probabilities, probabilities)
        self._mask[where] = best
        self._sums += np.bincount(best.ravel(), probabilities.ravel(), len(self._sums))
        self._pixels += np.bincount(best.ravel(), minlength=len(self._sums))

    def result(self, shape: tuple[int, ...] | None = None) -> Segmented:
        scores = np.asarray(self._sums / np.maximum(self._pixels, 1), np.float32)
        return Segmented(self._mask if shape is None else self._mask.reshape(shape), scores)


def _finite(embeds: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(embeds).all():
        raise TaskError(ENCODER_FAILED, "the embeddings hold values that are not finite (NaN or infinite)")
    return embeds


def _check_labels(embeds: NDArray[np.float32]) -> None:
    if not 1 <= len(embeds) <= MAX_LABELS:
        raise TaskError(INVALID_ARGUMENT, f"{len(embeds)} labels; 1 to {MAX_LABELS} are allowed")
    _finite(embeds)


def _check_values(places: int, labels: int, way_out: str) -> None:
    if places * labels > MAX_VALUES:
        most = MAX_VALUES // places
        raise TaskError(
            INVALID_ARGUMENT, f"{labels} labels are too many for this image; at most {most} are allowed {way_out}"
        )


def _check_proposals(
    masks: NDArray[np.uint8], scores: NDArray[np.float32] | None, image: Image.Image, labels: int
) -> None:
    expected = f"uint8 [N, {image.height}, {image.width}], N from 1, 255 inside and 0 outside"
    shape = list(masks.shape)
    if masks.dtype != np.uint8 or masks.ndim != 3 or shape[1:] != [image.height, image.width] or not len(masks):
        raise TaskError(INVALID_ARGUMENT, f"proposals are {masks.dtype} {shape}; for this image: {expected}")
    if masks.max() == 1:
        raise TaskError(INVALID_ARGUMENT, f"no value of the proposals is above 1; send {expected}")
    if scores is not None:
        if scores.shape != (len(masks), labels):
            raise TaskError(
                INVALID_ARGUMENT,
                f"proposal_scores have the shape {list(scores.shape)}; "
                f"[{len(masks)}, {labels}] is needed, a row for each proposal and a column for each label",
            )
        if not ((scores >= 0) & (scores <= 1)).all():
            raise TaskError(INVALID_ARGUMENT, "proposal_scores hold a value outside 0 to 1; send probabilities")


def _checker(cancelled: Cancelled | None) -> Callable[[], None]:
    def check() -> None:
        if cancelled is not None and cancelled():
            raise TaskError(CANCELLED, "the caller gave up")

    return check
