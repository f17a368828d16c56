"""The task `segment`: an image and labels in, a mask with the names of its labels out; with dense
patches, or with proposals (OVSeg): the masks of the request are classified, and pixels get their
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.embeddings import DEFAULT_POINT, Point
from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    NO_PATCH_ENCODER,
    Cancelled,
    TaskError,
    check_cancelled,
    invalid,
)
from radapter_serve.contract.images import MAX_PIXELS, ImageFile, decode, read_header, turn
from radapter_serve.contract.labels import class_probabilities
from radapter_serve.encoders.loaded import LoadedRelease, Part, Place, TaskSteps
from radapter_serve.tasks.dense import (
    BLOCK,
    MAX_LABELS,
    USUAL,
    MaskTally,
    ScoredMask,
    SegmentOptions,
    Windows,
    check_size,
    segment_densely,
)
from radapter_serve.tasks.embed import Labels, checked_labels, finite

BACKGROUND = "background"
# Work of one request, about a minute on one core: 1 for each pixel and label, and `REFINED` in each
# step of refinement, which takes so much longer.
MAX_WORK = 2**32
REFINED = 3.5
# 0.4 of 255: a proposal's crop shows the pixels above this value (Liang et al., OVSeg, CVPR 2023).
BINARY = 102
PROPOSAL_WEIGHT = 0.7


@dataclass(frozen=True, eq=False)
class SegmentRequest:
    """An image file to segment, densely or with proposals; values are checked on creation."""

    image: bytes | ImageFile
    labels: Labels
    point: Point | Place = DEFAULT_POINT
    options: SegmentOptions = USUAL
    proposals: NDArray[np.uint8] | None = None  # masks to classify, uint8 [N, H, W]
    proposal_scores: NDArray[np.float32] | None = None  # probabilities of the labels, [N, C]

    def __post_init__(self) -> None:
        if self.proposals is None:
            advice = dict.fromkeys(("proposal_weight", "proposal_scores"), "send proposals with it")
        else:
            names = "short_side", "stride", "refine"
            advice = dict.fromkeys(names, "leave it out with proposals")
            if self.proposal_scores is None:
                advice["proposal_weight"] = "send proposal_scores with it"
        values = {**vars(self.options), "proposal_scores": self.proposal_scores}
        for name, way_out in advice.items():
            if values[name] is not None:
                raise invalid(f"{name} has no effect here; {way_out}")


@dataclass(frozen=True)
class LabelledMask:
    """A mask, uint16 [H, W], of indices of labels, the labels, and the score of each, float32."""

    mask: NDArray[np.uint16]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]


def segment(
    loaded: LoadedRelease, request: SegmentRequest, cancelled: Cancelled | None = None
) -> TaskSteps[LabelledMask]:
    """Label each pixel of an image, with dense patches or with the proposals of the request."""
    # Check values and the header, before anything is encoded.
    release = loaded.release
    options = request.options
    place = loaded.place(request.point)
    window = loaded.preprocess.size[0]
    turned = loaded.preprocess.exif_orientation
    masks = request.proposals
    if masks is None:
        if not release.dense:
            raise TaskError(
                NO_PATCH_ENCODER,
                "this release has no patch_encoder; export with radapter-export --dense naclip, or"
                " send proposals",
            )
        options.sizes(window)  # raises if they do not fit
    asked = checked_labels(loaded, request.labels, place)
    count = len(asked.lines)
    if count > MAX_LABELS:
        raise invalid(f"{count} labels; 1 to {MAX_LABELS} are allowed")
    try:
        file = read_header(request.image)
        check_request(loaded, request, file, count)
        label_set = yield from asked.embed(cancelled)
        embeds = label_set.embeds

        # Each batch of windows or crops is encoded with the rows of other callers.
        part: Part = "patches" if masks is None else "images"
        windows: Windows[ScoredMask]
        with turn(file, cancelled, loaded.large_images):
            image = decode(file, exif_orientation=turned)
            if masks is None:
                windows = segment_densely(
                    loaded, image, embeds, options, rows=release.max_batch_size, cancelled=cancelled
                )
            else:
                scores = request.proposal_scores
                windows = segment_proposals(
                    loaded, image, embeds, masks, scores, options, cancelled=cancelled
                )
            del image  # frees a large image before the next one is decoded
            batch = next(windows)
        try:
            while True:
                encoded = yield from loaded.encoded(part, batch, place, cancelled)
                batch = windows.send(encoded)
        except StopIteration as done:
            scored: ScoredMask = done.value
    except MemoryError:
        raise TaskError(
            IMAGE_TOO_LARGE, "the server has not enough memory for this image; send a smaller one"
        ) from None
    extra = () if len(scored.scores) == len(label_set.labels) else (BACKGROUND,)
    return LabelledMask(scored.mask, label_set.labels + extra, scored.scores)


def check_request(
    loaded: LoadedRelease, request: SegmentRequest, file: ImageFile, count: int
) -> None:
    """Refuse, before decoding, an image that is too much work for this many labels, or that does
    not fit the options or the proposals.
    """
    options = request.options
    size = file.width, file.height
    work: float = size[0] * size[1] * count
    if options.refine:
        short_side, _ = options.sizes(loaded.preprocess.size[0])
        work += REFINED * short_side**2 * max(size) / min(size) * options.refine * count
    if work > MAX_WORK:
        raise invalid(
            f"{count} labels and {options.refine or 0} steps of refinement for an image of"
            f" {size[0]} x {size[1]} are {work / MAX_WORK:.1f} times the work that one"
            " request may ask for; send a smaller image, fewer labels or fewer steps"
        )
    if request.proposals is None:
        check_size(loaded, size, count, options)
    else:
        sizes = [size, size[::-1]] if loaded.preprocess.exif_orientation else [size]
        check_proposals(loaded, request.proposals, request.proposal_scores, sizes, count)


def check_proposals(
    loaded: LoadedRelease,
    masks: NDArray[np.uint8],
    scores: NDArray[np.float32] | None,
    sizes: Sequence[tuple[int, int]],
    labels: int,
) -> None:
    """Refuse masks or scores of a wrong shape or value, and too large crops, before decoding;
    `sizes` are the possible widths and heights of the image.
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
    # A square crop can be too large only for long and thin images.
    crop = loaded.release.crop
    if crop.side(max(masks.shape[1:])) ** 2 > MAX_PIXELS:
        for mask in masks:
            if mask.max() > BINARY:
                crop.box(mask > BINARY)


def segment_proposals(
    loaded: LoadedRelease,
    image: Image.Image,
    embeds: NDArray[np.float32],
    masks: NDArray[np.uint8],
    scores: NDArray[np.float32] | None = None,
    options: SegmentOptions = USUAL,
    *,
    cancelled: Cancelled | None = None,
) -> Windows[ScoredMask]:
    """Label each pixel of an image with the classes of the masks, uint8 [N, H, W], that cover it,
    as OVSeg does; yields batches of crops, and is sent their embeddings. The probabilities of a
    mask with `scores`, float32 [N, C], are scores^(1-w) p_clip^w.
    """
    finite(embeds)
    check_proposals(loaded, masks, scores, [image.size], len(embeds))
    check = partial(check_cancelled, cancelled)
    release = loaded.release
    # A crop shows the pixels above 0.4; a mask without such pixels is left out.
    used = [index for index, mask in enumerate(masks) if mask.max() > BINARY]

    # Classify the crop of each mask.
    cosines = yield from _crop_cosines(loaded, image, embeds, masks, used, check)
    del image
    classes = class_probabilities(cosines, release.logit_scale, release.logit_bias)
    if scores is not None:
        weight = options.proposal_weight
        if weight is None:
            weight = PROPOSAL_WEIGHT
        classes = scores[used] ** np.float32(1 - weight) * classes ** np.float32(weight)

    # Take the best label of each pixel, with sums over its masks.
    flat = masks.reshape(len(masks), -1)
    tally = MaskTally((flat.shape[1],), len(embeds), True, options.threshold)
    step = max(1, BLOCK // max(len(masks), len(embeds)))
    for where in (slice(start, start + step) for start in range(0, flat.shape[1], step)):
        check()
        part = flat[:, where][used]
        part = part[present := part.any(1)]
        # Runs of pixels with the same values in all masks have the same label: compute it once.
        changes = (part[:, 1:] != part[:, :-1]).any(0)
        starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
        lengths = np.diff(starts, append=part.shape[1])
        inside = part[:, starts].astype(np.float32) / 255
        sums = inside.T @ classes[present]
        total = inside.sum(0)
        sums /= np.maximum(total, 1)[:, None]  # where masks overlap, so that it is a probability
        best = sums.argmax(1)
        # Of labels with equal sums (a sigmoid ends at 1 in float32), take the one with the greater
        # cosines.
        equal = sums == sums.max(1, keepdims=True)
        unclear = equal.sum(1) > 1
        if unclear.any():
            ranks = inside.T[unclear] @ cosines[present]
            best[unclear] = np.where(equal[unclear], ranks, -np.inf).argmax(1)
        probabilities = np.take_along_axis(sums, best[:, None], 1)[:, 0]
        best[total == 0] = len(embeds)  # background
        tally.put(where, np.repeat(best, lengths), np.repeat(probabilities, lengths))
    return tally.result(masks.shape[1:])


def _crop_cosines(
    loaded: LoadedRelease,
    image: Image.Image,
    embeds: NDArray[np.float32],
    masks: NDArray[np.uint8],
    used: Sequence[int],
    check: Callable[[], None],
) -> Windows[NDArray[np.float32]]:
    """Compute the cosines of the labels with the crops of the `used` masks, [used, C]."""
    crop = loaded.release.crop
    rows = loaded.release.max_batch_size
    parts = []
    for start in range(0, len(used), rows):
        check()
        batch = used[start : start + rows]
        try:
            crops = [loaded.preprocess(crop(image, masks[index] > BINARY)) for index in batch]
        except (OSError, ValueError) as error:  # by Pillow, as for dense patches
            raise TaskError(INVALID_IMAGE, f"the image cannot be segmented ({error})") from None
        parts.append(finite((yield np.stack(crops))) @ embeds.T)
    return np.concatenate(parts)
