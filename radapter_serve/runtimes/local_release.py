"""A release in a model repository, run in this process as the server runs it, preprocessing and
tokenizer included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Encode, at
from radapter_serve.contract.tokenizer import Tokenizer, embed_texts
from radapter_serve.release.release import Release
from radapter_serve.release.repository import RUNTIMES, find_release
from radapter_serve.runtimes.embedding_release import EmbeddingRelease
from radapter_serve.runtimes.encoder import Encoder


class LocalRelease(EmbeddingRelease):
    """A release in a model repository, run in this process by the runtime that it was exported for.

    Args:
        repository: as of `find_release`.
        version: number of the release, where the repository names none.

    Raises:
        RAdapterError: no such release, or its runtime can't load it.

    Attributes:
        version: its number in the repository.
    """

    def __init__(self, repository: str | Path, version: int | None = None) -> None:
        folder = find_release(repository if version is None else f"{repository}@{version}")
        super().__init__(
            Release.load(folder), {"model_repository": str(Path(repository).absolute())}
        )
        self.version = int(folder.name)
        self._repository = folder.parent.parent
        self._tokenizer = Tokenizer.load(folder / "tokenizer.json", self.facts.tokenizer)
        self._images = self._encoder("image_encoder")
        self._texts = self._encoder("text_encoder")
        self._rows = self.facts.max_batch_size

    def encode_images(
        self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
    ) -> NDArray[np.float32]:
        return self._in_batches(self._images, images)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return embed_texts(texts, self._tokenizer, self._texts, self._rows)

    @cached_property
    def patch_encoder(self) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]] | None:
        """Prepared images, uint8 [B, S, S, 3], to float32 [B, g, g, D]; None where the release has
        no such graph.
        """
        if not (self._repository / "patch_encoder" / str(self.version)).is_dir():
            return None
        encoder = self._encoder("patch_encoder")
        return lambda pixels: self._in_batches(encoder, pixels)

    def _encoder(self, name: str) -> Encode:
        runtime = self.facts.runtime
        path = self._repository / name / str(self.version) / RUNTIMES[runtime].file
        encoder = Encoder(path, runtime, precision=self.facts.precision)
        return lambda values: at(encoder, self.facts.request_alpha.one(None))(values)

    def _in_batches(
        self,
        encoder: Encode,
        pixels: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    ) -> NDArray[np.float32]:
        starts = range(0, len(pixels), self._rows)
        return np.concatenate(
            [encoder(np.asarray(pixels[start : start + self._rows])) for start in starts]
        )
