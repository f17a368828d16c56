"""A release in a model repository, by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radapter_serve.evaluation.embedder import Variant, release_facts
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.serving.release import LocalRelease


class ReleaseEmbedder:
    """A release in a model repository, by ONNX Runtime, with the very preprocessing and tokenizer that are served.

    Args:
        repository: the model repository; `PATH@N` names a release, the newest otherwise.

    Raises:
        RAdapterError: no such release, or ONNX Runtime can't load it.
    """

    def __init__(self, repository: str) -> None:
        self._release = LocalRelease(repository)
        facts = self._release.facts
        self.templates = list(facts["templates"])
        self.variants: Sequence[Variant] = [Variant("release", facts["alpha"], release_facts(facts))]

    def select(self, variant: Variant) -> None:
        pass

    def prepare(self, data: bytes) -> Any:
        return self._release.prepare(data)

    def embed_images(self, items: Sequence[Any]) -> Floats:
        return self._release.encode_images(items)

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return self._release.embed_texts(texts)

    def close(self) -> None:
        pass
