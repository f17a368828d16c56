"""The task `segment`, without Triton: one request in, a mask with the names of its labels out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radapter_serve.contract.alpha import Encode, at, single
from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_IMAGE,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.contract.preprocess import ImageFile, decode, read_header, turn
from radapter_serve.release.release import Release
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.label_embeddings import LabelEmbedder, LabelSet
from radapter_serve.tasks.label_source import LabelSource
from radapter_serve.tasks.proposals import ProposalSegmenter
from radapter_serve.tasks.scored_mask import MAX_LABELS
from radapter_serve.tasks.segment_options import SegmentOptions

BACKGROUND = "background"
# Of one request: each pixel's score for each label counts once; and in each step of refinement
# REFINED times, which is how much longer that takes. It is about a minute of work for one core.
MAX_WORK = 2**32
REFINED = 3.5
_DENSE_ONLY = ("short_side", "stride", "refine")


@dataclass
class SegmentRequest:
    """One request of `segment`.

    Args:
        image: encoded image.
        labels: its labels, or None.
        label_set: name of a label set, or None.
        templates: prompt templates for `labels`, or None for the release's.
        options: those fields of `SegmentOptions` that the request gives.
        proposals: uint8 [N, H, W], or None for dense segmentation.
        proposal_scores: float32 [N, C], or None.
        alpha: one, or None for the release's own.
        cancelled: whether the caller has given up; None where that is unknown.
    """

    image: bytes | ImageFile
    labels: Sequence[bytes] | None = None
    label_set: bytes | None = None
    templates: Sequence[bytes] | None = None
    options: Mapping[str, Any] | None = None
    proposals: NDArray[np.uint8] | None = None
    proposal_scores: NDArray[np.float32] | None = None
    alpha: ArrayLike | None = None
    cancelled: Cancelled | None = None


@dataclass
class LabelledMask:
    """The answer: a mask, uint16 [H, W], the labels it points to, and the score of each,
    float32.
    """

    mask: NDArray[np.uint16]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]


class Segment:
    """Open-vocabulary segmentation.

    Args:
        release: its facts.
        encode_images: uint8 [B, S, S, 3], with α where that is an input, -> float32 [B, D] of unit
            length.
        encode_patches: the same to float32 [B, g, g, D], or None where the release has none.
        embed_labels: embeds the labels a request brings.
        label_sets: the release's label sets by name.
        max_work: of one request, see `MAX_WORK`.
    """

    def __init__(
        self,
        release: Release,
        encode_images: Encode,
        encode_patches: Encode | None,
        embed_labels: LabelEmbedder,
        label_sets: Mapping[str, LabelSet],
        *,
        max_work: float = MAX_WORK,
    ) -> None:
        self._label_source = LabelSource(release, embed_labels, label_sets)
        self._request_alpha = release.request_alpha
        self._release = release
        self._encode_images = encode_images
        self._encode_patches = encode_patches
        self._max_work = max_work

    def __call__(self, request: SegmentRequest) -> LabelledMask:
        """Segment one image.

        Raises:
            TaskError: whatever is wrong with the request; labels are refused before the image is
                looked at, and what asks for too much before anything is encoded.
        """
        options = _options(request)
        alpha = self._request_alpha(request.alpha, 1)
        own = single(alpha)
        patches = self._encode_patches
        dense = DenseSegmenter.of_release(
            self._release, None if patches is None else at(patches, own)
        )
        proposals = ProposalSegmenter.of_release(self._release, at(self._encode_images, own))
        if request.proposals is None:
            dense.check(options)
        wanted = self._label_source.read(
            None if request.labels is None else [request.labels],
            None if request.label_set is None else [request.label_set],
            None if request.templates is None else [request.templates],
            alpha,
        )
        masks = request.proposals
        cancelled = request.cancelled
        turned = dense.preprocess.exif_orientation
        with _image_errors():
            # All that the header tells is checked before anything is encoded or decoded.
            [labels] = wanted.counts
            file = read_header(request.image)
            size = file.width, file.height
            self._check_work(size, labels, options, dense.preprocess.size[0])
            if masks is None:
                dense.check_size(size, labels, options)
            else:
                either = [size, size[::-1]] if turned else [size]
                proposals.check(masks, request.proposal_scores, either, labels)
            [label_set] = wanted.embed(cancelled)
            embeds = label_set.embeds
            if masks is None:
                with turn(file, cancelled):
                    image = decode(file, exif_orientation=turned)
                    size = image.size
                    working = dense.working(image, options)
                    del image  # while the next large one is decoded
                found = dense.segment(size, working, embeds, options, cancelled=cancelled)
            else:
                with turn(file, cancelled):
                    image = decode(file, exif_orientation=turned)
                found = proposals(
                    image, embeds, masks, request.proposal_scores, options, cancelled=cancelled
                )
        extra = () if len(found.scores) == len(label_set.labels) else (BACKGROUND,)
        return LabelledMask(found.mask, label_set.labels + extra, found.scores)

    def _check_work(
        self, size: tuple[int, int], labels: int, options: SegmentOptions, window: int
    ) -> None:
        if labels > MAX_LABELS:
            raise invalid(f"{labels} labels; 1 to {MAX_LABELS} are allowed")
        pixels = size[0] * size[1]
        working = options.sizes(window)[0] ** 2 * max(size) / min(size) if options.refine else 0
        work = (pixels + REFINED * working * options.refine) * labels
        if work > self._max_work:
            raise invalid(
                f"{labels} labels and {options.refine} steps of refinement for an image of"
                f" {size[0]} x {size[1]} are {work / self._max_work:.1f} times the work that one"
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


def _options(request: SegmentRequest) -> SegmentOptions:
    given = dict(request.options or {})
    if request.proposals is None:
        idle = dict.fromkeys(("proposal_weight", "proposal_scores"), "send proposals with it")
    else:
        idle = dict.fromkeys(_DENSE_ONLY, "leave it out with proposals")
        if request.proposal_scores is None:
            idle["proposal_weight"] = "send proposal_scores with it"
    for name, way_out in idle.items():
        if name in given or (name == "proposal_scores" and request.proposal_scores is not None):
            raise invalid(f"{name} has no effect here; {way_out}")
    return SegmentOptions(**given)
