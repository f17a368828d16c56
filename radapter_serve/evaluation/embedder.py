"""What judging needs of models: embeddings of images and texts, and labels of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from radapter_serve.evaluation.metrics import Floats


@dataclass(frozen=True)
class Variant:
    """One of the models that an embedder holds.

    Attributes:
        source: `adapter`, `wise-ft`, `merged`, `release`, `server`.
        alpha: its α in [0, 1]; None where that is unknown.
        facts: what a row says of it: model, pretrained, precision, digests.
    """

    source: str
    alpha: float | None
    facts: Mapping[str, Any]


class Embedder(Protocol):
    """What judging needs of models, whichever way they run.

    Attributes:
        variants: the models that it holds; `select` says which one embeds.
        templates: prompt templates for data sets that bring none.
    """

    variants: Sequence[Variant]
    templates: list[str]

    def select(self, variant: Variant) -> None:
        """Embed by this model from now on."""

    def prepare(self, data: bytes) -> Any:
        """From the bytes of an image file to what `embed_images` takes; the same for all variants. Thread-safe."""

    def embed_images(self, items: Sequence[Any]) -> Floats:
        """Prepared images to float32 [N, D], unit length."""

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Texts to float32 [N, D], unit length."""

    def close(self) -> None:
        """Give back what it holds; a model that it was given is as it was."""


def release_facts(release: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of a release, given its `release.json`."""
    names = ("base_digest", "adapter_digest", "precision")
    facts = {"model": release["architecture"], "pretrained": release.get("pretrained")}
    return {**facts, **{name: release.get(name) for name in names}, "release": release["version"]}
