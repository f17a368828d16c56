"""Images to masks of labels given as text embeddings: by dense patches, or by classifying proposals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.inputs.alpha import Encode
from radapter_serve.inputs.errors import NO_PATCH_ENCODER, Cancelled, TaskError
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.inputs.preprocess import Preprocess
from radapter_serve.release.release import Release
from radapter_serve.tasks.dense import PATCH_SCALE, DenseSegmenter
from radapter_serve.tasks.proposals import ProposalSegmenter
from radapter_serve.tasks.scored_mask import ScoredMask
from radapter_serve.tasks.segment_options import USUAL, SegmentOptions


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
        self._preprocess = preprocess
        self._dense = self._proposals = None
        if encode_patches is not None:
            scale = PATCH_SCALE if logit_bias is None else logit_scale  # a bias belongs to its own scale
            self._dense = DenseSegmenter(encode_patches, preprocess, max_batch_size, scale, logit_bias)
        if encode_images is not None:
            self._proposals = ProposalSegmenter(
                encode_images, preprocess, crop, logit_scale, max_batch_size, logit_bias
            )

    @property
    def exif_orientation(self) -> bool:
        """Whether images are to be turned as their EXIF says."""
        return self._preprocess.exif_orientation

    @property
    def window(self) -> int:
        """Pixels of a side of what an encoder sees."""
        return self._preprocess.size[0]

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
        options: SegmentOptions = USUAL,
        *,
        cancelled: Cancelled | None = None,
    ) -> ScoredMask:
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
        return self.checked_dense(options)(image, embeds, options, cancelled)

    def checked_dense(self, options: SegmentOptions) -> DenseSegmenter:
        """What segments by patches.

        Raises:
            TaskError: no patch encoder, or options that do not fit.
        """
        if self._dense is None:
            raise TaskError(
                NO_PATCH_ENCODER,
                "this release has no patch_encoder; export with radapter-export --dense naclip, or send proposals",
            )
        options.sizes(self._preprocess.size[0])
        return self._dense

    def from_proposals(
        self,
        image: Image.Image,
        embeds: NDArray[np.float32],
        masks: NDArray[np.uint8],
        scores: NDArray[np.float32] | None = None,
        options: SegmentOptions = USUAL,
        *,
        cancelled: Cancelled | None = None,
    ) -> ScoredMask:
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
        assert self._proposals is not None
        return self._proposals(image, embeds, masks, scores, options, cancelled)
