"""The task `segment`, without Triton: one request in, a mask with the names of its labels out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.serving.errors import IMAGE_TOO_LARGE, INVALID_ARGUMENT, INVALID_IMAGE, TaskError
from radapter_serve.serving.label_source import LabelSource
from radapter_serve.serving.labels import LabelEmbedder, LabelSet
from radapter_serve.serving.preprocess import decode
from radapter_serve.serving.segment import EncodePatches, Segmented, Segmenter, SegmentOptions
from radapter_serve.serving.tasks import EncodeImages

BACKGROUND = "background"
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
        cancelled: whether the caller has given up; None where that is unknown.
    """

    image: bytes
    labels: Sequence[bytes] | None = None
    label_set: bytes | None = None
    templates: Sequence[bytes] | None = None
    options: Mapping[str, Any] | None = None
    proposals: NDArray[np.uint8] | None = None
    proposal_scores: NDArray[np.float32] | None = None
    cancelled: Callable[[], bool] | None = None


@dataclass
class Segments:
    """The answer: a mask, uint16 [H, W], the labels it points to, and the score of each, float32."""

    mask: NDArray[np.uint16]
    labels: tuple[str, ...]
    scores: NDArray[np.float32]


class Segment:
    """Open-vocabulary segmentation.

    Args:
        release: the release's facts.
        encode_images: uint8 [B, S, S, 3] -> float32 [B, D] of unit length.
        encode_patches: uint8 [B, S, S, 3] -> float32 [B, g, g, D] of unit length, or None where the release has none.
        embed_labels: embeds the labels a request brings.
        label_sets: the release's label sets by name.
    """

    def __init__(
        self,
        release: Mapping[str, Any],
        encode_images: EncodeImages,
        encode_patches: EncodePatches | None,
        embed_labels: LabelEmbedder,
        label_sets: Mapping[str, LabelSet],
    ) -> None:
        self._label_source = LabelSource(release["templates"], embed_labels, label_sets)
        self._segmenter = Segmenter.of_release(release, encode_patches, encode_images)

    def __call__(self, request: SegmentRequest) -> Segments:
        """Segment one image.

        Raises:
            TaskError: whatever is wrong with the request; labels are refused before the image is looked at.
        """
        options = _options(request)
        if request.proposals is None:
            self._segmenter.check_dense(options)
        [label_set] = self._label_source(
            None if request.labels is None else [request.labels],
            None if request.label_set is None else [request.label_set],
            None if request.templates is None else [request.templates],
            request.cancelled,
        )
        segmented = self._segment(request, label_set.embeds, options)
        extra = () if options.threshold is None else (BACKGROUND,)
        return Segments(segmented.mask, label_set.labels + extra, segmented.scores)

    def _segment(self, request: SegmentRequest, embeds: NDArray[np.float32], options: SegmentOptions) -> Segmented:
        try:
            image = decode(request.image)
            if request.proposals is None:
                return self._segmenter.dense(image, embeds, options, cancelled=request.cancelled)
            masks, scores = request.proposals, request.proposal_scores
            return self._segmenter.from_proposals(image, embeds, masks, scores, options, cancelled=request.cancelled)
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
            raise TaskError(INVALID_ARGUMENT, f"{name} has no effect here; {way_out}")
    return SegmentOptions(**given)
