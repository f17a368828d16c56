"""Both ways to segment, with the same encoders."""

from __future__ import annotations

from dataclasses import dataclass

from radapter_serve.contract.alpha import Encode
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.proposals import ProposalSegmenter


@dataclass(frozen=True)
class Segmenter:
    """By patches, and by masks that are given."""

    dense: DenseSegmenter
    from_proposals: ProposalSegmenter

    @classmethod
    def of(
        cls,
        patches: Encode | None,
        images: Encode,
        preprocess: Preprocess,
        crop: MaskCrop,
        scale: float,
        batch: int,
        bias: float | None = None,
    ) -> Segmenter:
        """With encoders, and what a release would say."""
        return cls(
            DenseSegmenter(patches, preprocess, batch, scale, bias),
            ProposalSegmenter(images, preprocess, crop, scale, batch, bias),
        )
