"""The task `segment`: an image and labels in, a mask with the names of its labels out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    NO_PATCH_ENCODER,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.contract.preprocess import ImageFile, decode, read_header, turn
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import Part, Steps
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.labels import Labels, check_labels, embed_label_set
from radapter_serve.tasks.masks import MAX_LABELS, ScoredMask, SegmentOptions, Windows
from radapter_serve.tasks.proposals import ProposalSegmenter

BACKGROUND = "background"
# Of one request: each pixel's score for each label counts once; and in each step of refinement
# REFINED times, which is how much longer that takes. It is about a minute of work for one core.
MAX_WORK = 2**32
REFINED = 3.5


@dataclass(frozen=True, eq=False)
class SegmentRequest:
    """An encoded image to segment, densely or by proposals; raises a `TaskError` for a value that
    is not allowed, or has no effect with the others.
    """

    image: bytes | ImageFile
    labels: Labels
    alpha: float | None = None  # None: the release's own
    # As of `SegmentOptions`; None: the usual value.
    threshold: float | None = None
    short_side: int | None = None
    stride: int | None = None
    refine: int | None = None
    proposals: NDArray[np.uint8] | None = None  # masks to classify, uint8 [N, H, W]
    proposal_scores: NDArray[np.float32] | None = None  # of the labels, [N, C]
    proposal_weight: float | None = None

    def __post_init__(self) -> None:
        if self.proposals is None:
            advice = dict.fromkeys(("proposal_weight", "proposal_scores"), "send proposals with it")
        else:
            names = "short_side", "stride", "refine"
            advice = dict.fromkeys(names, "leave it out with proposals")
            if self.proposal_scores is None:
                advice["proposal_weight"] = "send proposal_scores with it"
        for name, way_out in advice.items():
            if getattr(self, name) is not None:
                raise invalid(f"{name} has no effect here; {way_out}")
        _ = self.options  # raises what is wrong with them

    @property
    def options(self) -> SegmentOptions:
        """How the image is segmented."""
        names = "threshold", "short_side", "stride", "refine", "proposal_weight"
        values = {name: getattr(self, name) for name in names}
        return SegmentOptions(
            **{name: value for name, value in values.items() if value is not None}
        )


@dataclass(frozen=True)
class LabelledMask:
    """A mask, uint16 [H, W], the labels that it points to, and the score of each, float32."""

    mask: NDArray[np.uint16]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]


def segment(
    loaded: LoadedRelease, request: SegmentRequest, cancelled: Cancelled | None = None
) -> Steps[LabelledMask]:
    """Label each pixel of an image, by dense patches or by the proposals of the request.

    A `TaskError` says what is wrong: labels are refused before the image is looked at, and what
    asks for too much before anything is encoded.
    """
    # What can be refused by values and headers alone.
    release = loaded.release
    options = request.options
    alpha = loaded.request_alpha(request.alpha)
    window = loaded.preprocess.size[0]
    turned = loaded.preprocess.exif_orientation
    dense = DenseSegmenter.of(loaded)
    by_proposals = ProposalSegmenter.of(loaded)
    masks = request.proposals
    if masks is None:
        if not release.dense:
            raise TaskError(
                NO_PATCH_ENCODER,
                "this release has no patch_encoder; export with radapter-export --dense naclip, or"
                " send proposals",
            )
        options.sizes(window)  # raises what does not fit
    count = check_labels(loaded, request.labels, alpha)
    with _image_errors():
        file = read_header(request.image)
        size = file.width, file.height
        _check_work(size, count, options, window)
        if masks is None:
            dense.check_size(size, count, options)
        else:
            sizes = [size, size[::-1]] if turned else [size]
            by_proposals.check(masks, request.proposal_scores, sizes, count)

        label_set = yield from embed_label_set(loaded, request.labels, alpha, cancelled)
        embeds = label_set.embeds

        # Each batch of windows or crops is encoded with the rows of other callers.
        part: Part = "patches" if masks is None else "images"
        windows: Windows[ScoredMask]
        with turn(file, cancelled):
            image = decode(file, exif_orientation=turned)
            if masks is None:
                windows = dense.segment(image, embeds, options, cancelled=cancelled)
            else:
                scores = request.proposal_scores
                windows = by_proposals.segment(
                    image, embeds, masks, scores, options, cancelled=cancelled
                )
            del image  # a large one goes before the next is decoded
            batch = next(windows)
        try:
            while True:
                encoded = yield from loaded.encoded(part, batch, alpha, cancelled)
                batch = windows.send(encoded)
        except StopIteration as done:
            scored: ScoredMask = done.value
    extra = () if len(scored.scores) == len(label_set.labels) else (BACKGROUND,)
    return LabelledMask(scored.mask, label_set.labels + extra, scored.scores)


def _check_work(
    size: tuple[int, int],
    labels: int,
    options: SegmentOptions,
    window: int,
) -> None:
    if labels > MAX_LABELS:
        raise invalid(f"{labels} labels; 1 to {MAX_LABELS} are allowed")
    pixels = size[0] * size[1]
    working = options.sizes(window)[0] ** 2 * max(size) / min(size) if options.refine else 0
    work = (pixels + REFINED * working * options.refine) * labels
    if work > MAX_WORK:
        raise invalid(
            f"{labels} labels and {options.refine} steps of refinement for an image of"
            f" {size[0]} x {size[1]} are {work / MAX_WORK:.1f} times the work that one"
            " request may ask for; send a smaller image, fewer labels or fewer steps"
        )


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise TaskError(
            IMAGE_TOO_LARGE, "the server has not enough memory for this image; send a smaller one"
        ) from None
    except (OSError, ValueError) as error:  # what Pillow says of modes that it cannot resize
        raise TaskError(INVALID_IMAGE, f"the image cannot be segmented ({error})") from None
