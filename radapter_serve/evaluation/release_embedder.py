"""A release in a model repository, by its own runtime, and a live server's, through the client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.probabilities import class_probabilities
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
from radapter_serve.runtimes.embedding_release import EmbeddingRelease
from radapter_serve.runtimes.local_release import LocalRelease
from radapter_serve.runtimes.served_release import ServerRelease
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.proposals import ProposalSegmenter


class _Exported:
    """What both have in common: a release that embeds at the α that is selected, among those that
    it has.
    """

    _release: EmbeddingRelease

    def __init__(self, source: str, alphas: Sequence[float]) -> None:
        release = self._release
        facts = self._release.facts
        self.templates = list(facts.templates)
        self.crop = MaskCrop.from_dict(facts.crop)
        self.size = release.preprocess.size[0]
        self.exif_orientation = release.preprocess.exif_orientation
        self.variants = release_variants(source, facts, alphas)

    @property
    def facts(self) -> Release:
        """What the release says of itself."""
        return self._release.facts

    def select(self, variant: Variant) -> None:
        assert variant.alpha is not None
        self._release.set_alpha(variant.alpha)

    def embed_images(self, items: Sequence[Any]) -> Floats:
        return self._release.encode_images(items)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return self._release.embed_texts(texts)

    def probabilities(self, cosines: Floats) -> Floats:
        facts = self._release.facts
        return class_probabilities(cosines, facts.logit_scale, facts.logit_bias)

    def way(self, dense: str | None) -> str:
        return exported_way(self._release.facts, dense)


class ReleaseEmbedder(_Exported):
    """A release in a model repository, by its own runtime, with the very preprocessing and
    tokenizer that are served.

    Args:
        repository: the model repository; `PATH@N` names a release, the newest otherwise.
        alphas: re-scalings in [0, 1] to evaluate; the release's own if none.

    Raises:
        RAdapterError: no such release, one that lacks an α, or its runtime can't load it.
    """

    _release: LocalRelease

    def __init__(self, repository: str, alphas: Sequence[float] = ()) -> None:
        self._release = LocalRelease(repository)
        super().__init__("release", alphas)

    def prepare(self, data: bytes) -> Any:
        return self._release.prepare(data)

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        segmenter: DenseSegmenter | ProposalSegmenter
        release = self._release
        if query.dense == PROPOSALS:
            segmenter = ProposalSegmenter.of_release(release.facts, release.encode_images)
        else:
            segmenter = DenseSegmenter.of_release(release.facts, release.patch_encoder)
        embeds = class_embeds(self.embed_texts, query.labels, query.templates, known)
        return segment_here(segmenter, embeds, query.options)

    def close(self) -> None:
        pass


class ServerEmbedder(_Exported):
    """A live server, through the client, pinned to its newest release; it decodes and segments
    images itself.

    Args:
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.
        alphas: re-scalings in [0, 1] to evaluate; the release's own if none.

    Raises:
        RAdapterError: nobody answers there, or the release lacks an α.
    """

    _release: ServerRelease

    def __init__(self, url: str, alphas: Sequence[float] = ()) -> None:
        self._release = ServerRelease(url)
        super().__init__("server", alphas)

    def prepare(self, data: bytes) -> Any:
        return data

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
            answer = self._release.ask(
                self._release.client.segment,
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

    def close(self) -> None:
        self._release.close()


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
