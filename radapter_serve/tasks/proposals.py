"""Segmentation by proposals (OVSeg): masks that a request brings are classified, and their classes
go to pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.errors import Cancelled, check_cancelled, invalid
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import MAX_PIXELS, Preprocess
from radapter_serve.contract.probabilities import class_probabilities
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
from radapter_serve.tasks.windows import BLOCK

# 0.4 of 255: a proposal's crop holds the pixels above it (Liang et al., OVSeg, CVPR 2023).
BINARY = 102


@dataclass(frozen=True)
class ProposalSegmenter:
    """Labels each pixel of an image by the classes of the masks that cover it, as OVSeg does.

    Each mask's crop is classified as `classify` does it; with scores, the class probabilities of
    mask q are p_q = scores_q^(1-w) p_clip^w. A pixel gets the best label of sum_q p_q mask_q,
    divided by sum_q mask_q where that is above one (which changes no label and keeps it a
    probability). A pixel without any mask is background, with a threshold or without.
    """

    preprocess: Preprocess  # makes the image encoder's input
    crop: MaskCrop  # how a mask is shown to the image encoder
    logit_scale: float
    max_batch_size: int
    logit_bias: float | None = None  # of a model that was trained with a sigmoid loss

    @classmethod
    def of(cls, loaded: LoadedRelease) -> ProposalSegmenter:
        """As a release says."""
        release = loaded.release
        crop = MaskCrop.from_dict(release.crop)
        size = release.max_batch_size
        return cls(loaded.preprocess, crop, release.logit_scale, size, release.logit_bias)

    def check(
        self,
        masks: NDArray[np.uint8],
        scores: NDArray[np.float32] | None,
        sizes: Sequence[tuple[int, int]],
        labels: int,
    ) -> None:
        """Raise a `TaskError` for masks or scores that do not fit, or hold nothing, and for a crop
        that is too large, before anything is decoded; `sizes` are widths and heights that the
        image may have.
        """
        width, height = sizes[0]
        expected = f"uint8 [N, {height}, {width}], N from 1, 255 inside and 0 outside"
        shape = list(masks.shape)
        if (
            masks.dtype != np.uint8
            or masks.ndim != 3
            or (shape[2], shape[1]) not in sizes
            or not len(masks)
        ):
            raise invalid(f"proposals are {masks.dtype} {shape}; for this image: {expected}")
        most = masks.max()
        if most == 1:
            raise invalid(f"no value of the proposals is above 1; send {expected}")
        if most <= BINARY:
            raise invalid(f"all {len(masks)} proposals are empty: no value is above {BINARY}")
        if scores is not None:
            if scores.shape != (len(masks), labels):
                raise invalid(
                    f"proposal_scores have the shape {list(scores.shape)}; [{len(masks)}, {labels}]"
                    " is needed, a row for each proposal and a column for each label"
                )
            if not ((scores >= 0) & (scores <= 1)).all():
                raise invalid("proposal_scores hold a value outside 0 to 1; send probabilities")
        # Only of long and thin images a square crop may be too large.
        if self.crop.side(max(masks.shape[1:])) ** 2 > MAX_PIXELS:
            for mask in masks:
                if mask.max() > BINARY:
                    self.crop.box(mask > BINARY)

    def segment(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        masks: NDArray[np.uint8],
        scores: NDArray[np.float32] | None = None,
        options: SegmentOptions = USUAL,
        *,
        cancelled: Cancelled | None = None,
    ) -> Windows[ScoredMask]:
        """Segment an image by labels' text embeddings of unit length, float32 [C, D]; yields
        batches of crops, and is sent their embeddings.

        `masks`, uint8 [N, H, W], have the probability of each mask, 0 to 255: a crop holds what is
        above 0.4, and a mask that holds nothing is left out. `scores`, float32 [N, C], are the
        proposals' class probabilities. Raises a `TaskError` for what does not fit, and for a caller
        who has left.
        """
        check_label_embeddings(embeds)
        self.check(masks, scores, [image.size], len(embeds))
        check = partial(check_cancelled, cancelled)
        used = [index for index, mask in enumerate(masks) if mask.max() > BINARY]
        cosines = yield from self._cosines(
            (self.crop(image, masks[index] > BINARY) for index in used), embeds, check
        )
        classes = class_probabilities(cosines, self.logit_scale, self.logit_bias)
        if scores is not None:
            weight = options.proposal_weight
            classes = scores[used] ** np.float32(1 - weight) * classes ** np.float32(weight)
        flat = masks.reshape(len(masks), -1)
        tally = MaskTally((flat.shape[1],), len(embeds), True, options.threshold)
        step = max(1, BLOCK // max(len(masks), len(embeds)))
        for where in (slice(start, start + step) for start in range(0, flat.shape[1], step)):
            check()
            part = flat[:, where][used]
            part = part[present := part.any(1)]
            # Runs of pixels that are inside the same masks have the same label.
            changes = (part[:, 1:] != part[:, :-1]).any(0)
            starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
            lengths = np.diff(starts, append=part.shape[1])
            inside = part[:, starts].astype(np.float32) / 255
            sums = inside.T @ classes[present]
            total = inside.sum(0)
            sums /= np.maximum(total, 1)[:, None]
            best = _best(sums, inside.T, cosines[present])
            probabilities = np.take_along_axis(sums, best[:, None], 1)[:, 0]
            best[total == 0] = len(embeds)
            tally.put(where, np.repeat(best, lengths), np.repeat(probabilities, lengths))
        return tally.result(masks.shape[1:])

    def _cosines(
        self, images: Iterator[Image.Image], embeds: NDArray[np.float32], check: Callable[[], None]
    ) -> Windows[NDArray[np.float32]]:
        """Cosines of images with the labels, float32 [N, C]."""
        parts = []
        while batch := [
            self.preprocess(image) for image in itertools.islice(images, self.max_batch_size)
        ]:
            check()
            parts.append(finite((yield np.stack(batch))) @ embeds.T)
        return np.concatenate(parts)


def _best(
    sums: NDArray[np.float32], inside: NDArray[np.float32], cosines: NDArray[np.float32]
) -> NDArray[np.intp]:
    """The best label of each pixel by its scores [P, C]; of equal ones, as a sigmoid ends at 1 in
    float32, that with the greater cosines [N, C] of the masks that it is inside of, [P, N].
    """
    best: NDArray[np.intp] = sums.argmax(1)
    equal = sums == sums.max(1, keepdims=True)
    unclear = equal.sum(1) > 1
    if unclear.any():
        ranks = np.where(equal[unclear], inside[unclear] @ cosines, -np.inf)
        best[unclear] = ranks.argmax(1)
    return best
