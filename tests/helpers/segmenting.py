"""Both ways to segment, with the same encoders."""

from __future__ import annotations

from typing import Any

from PIL import Image

from radapter_serve.contract.errors import Encode
from radapter_serve.contract.preprocess import MaskCrop, Preprocess
from radapter_serve.tasks.dense import DenseSegmenter, ScoredMask, encode_windows
from radapter_serve.tasks.segment import ProposalSegmenter


class Segmenter:
    """By patches, and by masks that are given; with encoders, and what a release would say."""

    def __init__(
        self,
        patches: Encode,
        images: Encode,
        preprocess: Preprocess,
        crop: MaskCrop,
        scale: float,
        batch: int,
        bias: float | None = None,
    ) -> None:
        self._patches = patches
        self._images = images
        self._dense = DenseSegmenter(preprocess, batch, scale, bias)
        self._proposals = ProposalSegmenter(preprocess, crop, scale, batch, bias)

    def dense(self, image: Image.Image, *arguments: Any, **options: Any) -> ScoredMask:
        return encode_windows(self._dense.segment(image, *arguments, **options), self._patches)

    def from_proposals(self, image: Image.Image, *arguments: Any, **options: Any) -> ScoredMask:
        windows = self._proposals.segment(image, *arguments, **options)
        return encode_windows(windows, self._images)
