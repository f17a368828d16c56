"""A release in a model repository, by its own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radapter_serve.evaluation.embedder import (
    PROPOSALS,
    SegmentImage,
    SegmentQuery,
    Variant,
    exported_way,
    release_variants,
    segment_here,
)
from radapter_serve.evaluation.evaluation_set import class_embeds
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.runtimes.local_release import LocalRelease
from radapter_serve.tasks.segmenter import Segmenter


class ReleaseEmbedder:
    """A release in a model repository, by its own runtime, with the very preprocessing and tokenizer that are served.

    Args:
        repository: the model repository; `PATH@N` names a release, the newest otherwise.
        alphas: re-scalings in [0, 1] to evaluate; the release's own if none.

    Raises:
        RAdapterError: no such release, one that lacks an α, or its runtime can't load it.
    """

    def __init__(self, repository: str, alphas: Sequence[float] = ()) -> None:
        self._release = LocalRelease(repository)
        facts = self._release.facts
        self.templates = list(facts.templates)
        self.size, self.crop = self._release.preprocess.size[0], MaskCrop.from_dict(facts.crop)
        self.exif_orientation = self._release.preprocess.exif_orientation
        self.variants = release_variants("release", facts, alphas)

    def select(self, variant: Variant) -> None:
        assert variant.alpha is not None
        self._release.set_alpha(variant.alpha)

    def prepare(self, data: bytes) -> Any:
        return self._release.prepare(data)

    def embed_images(self, items: Sequence[Any]) -> Floats:
        return self._release.encode_images(items)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return self._release.embed_texts(texts)

    def way(self, dense: str | None) -> str:
        return exported_way(self._release.facts, dense)

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        patches = None if query.dense == PROPOSALS else self._release.patch_encoder
        segmenter = Segmenter.of_release(self._release.facts, patches, self._release.encode_images)
        embeds = class_embeds(self.embed_texts, query.labels, query.templates, known)
        return segment_here(segmenter, embeds, query.options)

    def close(self) -> None:
        pass
