"""What holds the images of an index: a folder or a running Qdrant, with one
interface.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radapter_serve.index.facts import IndexFacts

TABLE = "images"
THUMBNAIL = "thumbnail"
# : of up to so many images a search compares every embedding; of more, an approximate index names
# candidates
EXACT = 20_000


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Args:
        id: its path from the index's root.
        score: cosine, in [-1, 1].
        metadata: all columns but embedding and thumbnail, ready for JSON.
        thumbnail: JPEG; empty where it was not asked for, or there is none.
    """

    id: str
    score: float
    metadata: dict[str, Any]
    thumbnail: bytes = b""


class Store(Protocol):
    """One generation of an index, which never changes."""

    def find(
        self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool
    ) -> list[Hit]:
        """The nearest images, in any order.

        Args:
            embedding: float32 [D], unit length.
            top_k: how many at most.
            where: a condition in SQL, or None.
            thumbnails: whether the hits have theirs.

        Raises:
            TaskError: the condition is not allowed, or the store can't be read.
        """

    def embeddings(self, ids: list[str]) -> dict[str, NDArray[np.float32]]:
        """The embeddings of those of these images that are there, float32 [D] each.

        Raises:
            TaskError: the store can't be read.
        """

    def rows(self, columns: list[str], batch: int) -> Iterator[Any]:
        """Columns of all images as Arrow's record batches of at most so many rows, in one order.

        Raises:
            RAdapterError: the store can only be searched.
        """


class Place(Protocol):
    """Where an index is: names the generation that counts, and opens it."""

    def current(self) -> tuple[str, IndexFacts]:
        """The name of the generation that counts, and its facts.

        Raises:
            RAdapterError: there is no index, or it can't be read.
        """

    def open(self, generation: str, facts: IndexFacts, *, complete: bool) -> Store:
        """A generation, to be searched.

        Args:
            generation, facts: as in `current`.
            complete: whether all files on this machine's disk are compared with their digests,
                however large.

        Raises:
            RAdapterError: it is not there, or damaged.
        """


def plain(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(one) for one in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def vectors_of(column: Any) -> NDArray[np.float32]:
    """An Arrow column of embeddings as float32 [N, D]."""
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(
        len(array), -1
    )
