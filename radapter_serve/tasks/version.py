"""One release as the tasks see it: its facts, its files, and its encoders, wherever these run."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.environment import LABELS
from radapter_serve.release.release import Release
from radapter_serve.tasks.classify import EmbedImages, EmbedTexts, load_label_sets
from radapter_serve.tasks.label_embeddings import LabelEmbedder, LabelSet
from radapter_serve.tasks.label_store import LabelStore
from radapter_serve.threads import decoders

if TYPE_CHECKING:
    from radapter_serve.tasks.retrieve import Embedder


class Version(ABC):
    """A release with its encoders.

    Args:
        release: its facts.
        folder: with its tokenizer and label sets.
        indexes: folder of the indexes that `retrieve` searches.
        origin: where the release is, as `radapter-index build --model-repository` takes it.
    """

    def __init__(self, release: Release, folder: Path, indexes: Path, origin: str) -> None:
        self.release = release
        self.folder = folder
        self.indexes = indexes
        self.origin = origin

    @abstractmethod
    def encode_images(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, D] of unit length; here and below with α where that is
        an input.
        """

    @abstractmethod
    def encode_patches(
        self, pixels: NDArray[np.uint8], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] -> float32 [B, g, g, D]; only where `release.dense` says how."""

    @abstractmethod
    def encode_tokens(
        self, tokens: NDArray[np.int32], alpha: Alpha | None = None
    ) -> NDArray[np.float32]:
        """int32 [B, L] -> float32 [B, D] of unit length."""

    @abstractmethod
    def embedder(self) -> Embedder:
        """What embeds the queries of `retrieve`: a text or an image, together with what others ask
        for.
        """

    @abstractmethod
    def others(self) -> Iterable[Embedder]:
        """The other releases that are served, for the indexes that they made."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The release's tokenizer."""
        return Tokenizer.load(self.folder / "tokenizer.json", self.release.tokenizer)

    @cached_property
    def label_sets(self) -> dict[str, LabelSet]:
        """The release's label sets by name."""
        return load_label_sets(self.folder / "label_sets")

    @cached_property
    def embed_images(self) -> EmbedImages:
        """The task that embeds images."""
        return EmbedImages(self.release, self.encode_images, threads=decoders())

    @cached_property
    def embed_texts(self) -> EmbedTexts:
        """The task that embeds texts."""
        return EmbedTexts(self.release, self.tokenizer, self.encode_tokens)

    @cached_property
    def embed_labels(self) -> LabelEmbedder:
        """What embeds the labels that requests bring, and keeps their embeddings."""
        shared = os.environ.get(LABELS)
        return LabelEmbedder(
            self.tokenizer,
            self.encode_tokens,
            max_batch_size=self.release.max_batch_size,
            store=LabelStore(Path(shared)) if shared else None,
            release=json.dumps(self.release.to_dict(), sort_keys=True),
        )

    def close(self) -> None:
        """End the threads that decode images."""
        if "embed_images" in self.__dict__:
            self.embed_images.close()
