"""A release in a model repository, by its own runtime, and a live server's, through the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.probabilities import class_probabilities
from radapter_serve.encoders.loaded import LoadedRelease, ServerEncoder, served_release
from radapter_serve.evaluation.embedder import (
    PROPOSALS,
    NoSuchWay,
    SegmentImage,
    SegmentQuery,
    Variant,
    release_facts,
    segment_here,
)
from radapter_serve.evaluation.evaluation_set import class_embeds
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.release.release import Release
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.proposals import ProposalSegmenter


class ReleaseEmbedder:
    """A release that embeds at the α that is selected, among those that it has.

    Args:
        loaded: the release.
        alphas: re-scalings in [0, 1] to evaluate; the release's own if none.
        source: `release` or `server`.

    Raises:
        RAdapterError: the release lacks an α.
    """

    def __init__(
        self, loaded: LoadedRelease, alphas: Sequence[float] = (), source: str = "release"
    ) -> None:
        self.loaded = loaded
        self.templates = list(loaded.release.templates)
        self.crop = MaskCrop.from_dict(loaded.release.crop)
        self.size = loaded.preprocess.size[0]
        self.exif_orientation = loaded.preprocess.exif_orientation
        self.variants = release_variants(source, loaded.release, alphas)

    def select(self, variant: Variant) -> None:
        assert variant.alpha is not None
        self.loaded = self.loaded.at(variant.alpha)

    def prepare(self, data: bytes) -> Any:
        return self.loaded.pixels(data)

    def embed_images(self, items: Sequence[Any]) -> Floats:
        return self.loaded.embed_pixels(items)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return self.loaded.embed_texts(texts)

    def probabilities(self, cosines: Floats) -> Floats:
        release = self.loaded.release
        return class_probabilities(cosines, release.logit_scale, release.logit_bias)

    def way(self, dense: str | None) -> str:
        return exported_way(self.loaded.release, dense)

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        segmenter: DenseSegmenter | ProposalSegmenter
        loaded = self.loaded
        if query.dense == PROPOSALS:
            segmenter = ProposalSegmenter.of_release(loaded.release, loaded.embed_pixels)
        else:
            patches = loaded.embed_patches if loaded.release.dense else None
            segmenter = DenseSegmenter.of_release(loaded.release, patches)
        embeds = class_embeds(self.embed_texts, query.labels, query.templates, known)
        return segment_here(segmenter, embeds, query.options)

    def close(self) -> None:
        self.loaded.close()


class ServerEmbedder(ReleaseEmbedder):
    """A live server, through the client, pinned to its newest release; it decodes and segments
    images itself.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.
        alphas: as of `ReleaseEmbedder`.

    Raises:
        RAdapterError: nobody answers there, or the release lacks an α.
    """

    def __init__(self, url: str, alphas: Sequence[float] = ()) -> None:
        loaded = served_release(url)
        assert isinstance(loaded.encoder, ServerEncoder)
        self._encoder = loaded.encoder
        super().__init__(loaded, alphas, "server")

    def prepare(self, data: bytes) -> Any:
        return data

    def embed_images(self, items: Sequence[Any]) -> Floats:
        embeds = self._ask(self._encoder.client.embed_images, list(items))
        return np.asarray(embeds, np.float32)

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        options = query.options
        windows: dict[str, Any] = {}
        if query.dense != PROPOSALS:
            windows = {
                "short_side": options.short_side,
                "stride": options.stride,
                "refine": options.refine,
            }

        def segment(
            data: bytes, masks: NDArray[np.uint8] | None, scores: NDArray[np.float32] | None
        ) -> NDArray[np.uint16]:
            answer = self._ask(
                self._encoder.client.segment,
                data,
                list(query.labels),
                templates=list(query.templates),
                threshold=options.threshold,
                proposals=masks,
                proposal_scores=scores,
                proposal_weight=None if scores is None else options.proposal_weight,
                **windows,
            )
            return np.asarray(answer.mask, np.uint16)

        return segment

    def _ask(self, task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        alpha = self.loaded.request_alpha(None)
        return self._encoder.ask(task, *arguments, alpha=alpha, **options)


def release_variants(source: str, release: Release, alphas: Sequence[float]) -> Sequence[Variant]:
    """The models of a release: itself, or itself at each of several α, which only one whose α is an
    input has.

    Raises:
        RAdapterError: it does not have one of these α.
    """
    facts = release_facts(release)
    if release.quantization:  # of int8: ranges found as it runs, or by which images
        facts = replace(facts, quantization=release.quantization)
    return [Variant(source, release.at(alpha).alpha, facts) for alpha in alphas or (release.alpha,)]


def exported_way(release: Release, dense: str | None) -> str:
    """`Embedder.way` of a release."""
    own = (release.dense or {}).get("way")
    if dense == PROPOSALS or (own and dense in (None, own)):
        return dense or str(own)
    has = f"has dense {own}" if own else "has no patch_encoder"
    wanted = dense or "naclip"
    raise NoSuchWay(
        f"release {release.version} {has}; export one with radapter-export --dense {wanted}"
    )
