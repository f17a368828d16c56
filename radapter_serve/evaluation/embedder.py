"""What an evaluation needs from models: embeddings of images and texts, and labels of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import decode
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.row import ModelFacts
from radapter_serve.release.release import Release
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.proposals import ProposalSegmenter
from radapter_serve.tasks.segment_options import SegmentOptions

PROPOSALS = "proposals"  # in place of a way: masks are given, and their crops are classified
# From the bytes of an image file, and masks uint8 [N, H, W] where masks are given, perhaps with
# their own probabilities of the labels float32 [N, C], to the index of each pixel's label, uint16
# [H, W]; C stands for the background.
SegmentImage = Callable[
    [bytes, NDArray[np.uint8] | None, NDArray[np.float32] | None], NDArray[np.uint16]
]


@dataclass(frozen=True)
class Variant:
    """One of the models that an embedder holds.

    Attributes:
        source: `adapter`, `wise-ft`, `checkpoint`, `lora`, `merged`, `release`, `server`.
        alpha: its α in [0, 1]; None where that is unknown.
        facts: what a row says about it.
    """

    source: str
    alpha: float | None
    facts: ModelFacts

    @property
    def key(self) -> tuple[str, float | None]:
        """What tells the models of one embedder apart."""
        return self.source, self.alpha


@dataclass(frozen=True)
class SegmentQuery:
    """Labels and options to segment images by.

    Attributes:
        labels: names, synonyms after commas.
        templates: prompt templates with `{}`.
        dense: a way from image patches to embeddings, from `Embedder.way`, or `proposals`.
        options: of the windows, or of the fusion of proposals.
    """

    labels: Sequence[str]
    templates: Sequence[str]
    dense: str
    options: SegmentOptions


class NoSuchWay(RAdapterError):
    """These models have no dense embeddings in the way that is asked for; the message says how to
    get some.
    """


class Embedder(Protocol):
    """Models that can be evaluated, whichever way they run.

    Attributes:
        variants: the models that it holds; `select` chooses the one that embeds.
        templates: prompt templates for data sets that bring none.
        size: side of the image encoder's input in pixels, which is the window's too.
        crop: how the masks of proposals are shown.
        exif_orientation: whether it turns images as their EXIF says.
    """

    variants: Sequence[Variant]
    templates: list[str]
    size: int
    crop: MaskCrop
    exif_orientation: bool

    def select(self, variant: Variant) -> None:
        """Use this model from now on."""

    def prepare(self, data: bytes) -> Any:
        """Decode an image file for `embed_images`; the result is the same for all variants.
        Thread-safe.
        """

    def embed_images(self, items: Sequence[Any]) -> Floats:
        """Prepared images to float32 [N, D], unit length."""

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Texts to float32 [N, D], unit length."""

    def probabilities(self, cosines: Floats) -> Floats:
        """The probability of each label, float32 [N, C], by the model that is selected.

        Args:
            cosines: of images with labels, [N, C].
        """

    def way(self, dense: str | None) -> str:
        """The way of dense embeddings to use where `dense` is asked for; None asks for the models'
        own.

        Raises:
            NoSuchWay: these models do not have it.
        """

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        """A function that segments images by the model that is selected now; call it only while
        that is selected.

        Args:
            query: labels, templates and options.
            known: embeddings of labels by this model, as in `class_embeds`; new ones are added.
        """

    def close(self) -> None:
        """Release what it holds, and restore the weights of a model that it was given."""


def segment_here(
    segmenter: DenseSegmenter | ProposalSegmenter, embeds: Floats, options: SegmentOptions
) -> SegmentImage:
    """Segment in this process.

    Args:
        segmenter: of the model, for the way that is asked for.
        embeds: of the labels, [C, D].
        options: as of `SegmentQuery`.
    """

    def segment(
        data: bytes, masks: NDArray[np.uint8] | None, scores: NDArray[np.float32] | None
    ) -> NDArray[np.uint16]:
        image = decode(data, exif_orientation=segmenter.preprocess.exif_orientation)
        if isinstance(segmenter, DenseSegmenter):
            return segmenter(image, embeds, options).mask
        assert masks is not None
        return segmenter(image, embeds, masks, scores, options).mask

    return segment


def release_facts(release: Release) -> ModelFacts:
    """What a row says of a release."""
    return ModelFacts(
        model=release.architecture,
        base_digest=release.base_digest,
        adapter_digest=release.adapter_digest,
        precision=release.precision,
        release=release.version,
    )
