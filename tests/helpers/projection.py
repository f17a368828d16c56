"""A release that embeds images by a fixed random projection of their colours, and its searches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.loaded import Answered, LoadedRelease
from radapter_serve.index.facts import Index
from radapter_serve.index.index import Indexes
from radapter_serve.tasks.retrieve import Retrieved, RetrieveRequest, retrieve
from tests.helpers.small_models import preprocess, release

DIM = 16
SIZE = 4
TEXTS = np.random.default_rng(7).standard_normal((9, DIM)).astype(np.float32)
TEXTS /= np.linalg.norm(TEXTS, axis=1, keepdims=True)


class Projection:
    """An encoder; a text is the number of its vector in `texts`, or its length is."""

    def __init__(self, texts: NDArray[np.float32]) -> None:
        self.embedded = 0  # images so far
        self._texts = texts
        self._weight = np.random.default_rng(0).standard_normal((SIZE * SIZE * 3, DIM))

    def images(self, pixels: NDArray[np.uint8], alpha: Any = None) -> NDArray[np.float32]:
        self.embedded += len(pixels)
        embeds = (pixels.reshape(len(pixels), -1) / 255 - 0.5) @ self._weight
        return np.asarray(embeds / np.linalg.norm(embeds, axis=1, keepdims=True), np.float32)

    patches = images

    def tokens(self, tokens: NDArray[np.int32], alpha: Any = None) -> NDArray[np.float32]:
        return self._texts[tokens[:, 0]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts, one for each: the number that it is, or else its length."""
        numbers = (int(text) if text.isdecimal() else len(text) for text in texts)
        return [[number % len(self._texts)] for number in numbers]

    def batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        return np.array(rows, np.int32)

    def close(self) -> None:
        pass


def projecting(
    indexes: Path = Path("indexes"), texts: NDArray[np.float32] = TEXTS, **facts: Any
) -> LoadedRelease:
    """The release with other facts; `texts` are float32 [N, 16], of unit length."""
    known = {"embed_dim": DIM, "preprocess": preprocess(SIZE, mode="squash"), **facts}
    encoder: Any = Projection(texts)
    origin = {"model_repository": "/models of mine"}
    return LoadedRelease(release(**known), encoder, encoder, indexes=indexes, origin=origin)


def embeds_of(files: Sequence[Path]) -> NDArray[np.float32]:
    """The embeddings of images, float32 [N, 16]."""
    loaded = projecting()
    return loaded.embed_pixels([loaded.pixels(file.read_bytes()) for file in files])


@dataclass(frozen=True)
class Searching:
    """The task `retrieve` of a release."""

    indexes: Indexes

    @classmethod
    def of(cls, release: LoadedRelease, clock: Callable[[], float] = time.monotonic) -> Searching:
        """Make it with a clock that says when to ask again what was published last."""
        return cls(Indexes(release, clock=clock))

    def __call__(self, request: RetrieveRequest, cancelled: Cancelled | None = None) -> Retrieved:
        return self.answered(request, cancelled).answer

    def answered(
        self, request: RetrieveRequest, cancelled: Cancelled | None = None
    ) -> Answered[Retrieved]:
        """The answer with its place, as receipts have it."""
        return complete(retrieve(self.indexes, request, cancelled))

    def ids(self, request: RetrieveRequest) -> list[str]:
        """The names of the images that were found."""
        return [hit.id for hit in self(request).hits]

    def index(self, name: str) -> Index:
        """An index as it is now."""
        return self.indexes.get(name)[0]
