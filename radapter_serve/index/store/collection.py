"""A generation of an index that a running Qdrant holds: vectors, metadata and thumbnails."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client import models

from radapter_serve.errors import RAdapterError
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.filters import OWN, to_filter
from radapter_serve.index.store import EXACT, THUMBNAIL, Hit
from radapter_serve.index.store.qdrant import Qdrant, qdrant_errors
from radapter_serve.inputs.errors import UNKNOWN_INDEX, TaskError, public


class Collection:
    """A collection of Qdrant's, to be searched.

    Args:
        place: where Qdrant is.
        name: of the collection.
        facts: of the index.
    """

    def __init__(self, place: Qdrant, name: str, facts: IndexFacts) -> None:
        self._place = place
        self._name = name
        self._facts = facts

    def rows(self, columns: list[str], batch: int) -> Iterator[Any]:
        raise RAdapterError(
            f"{self._place.url} is an index in Qdrant, which can only be searched and shown; give the index that was "
            "published"
        )

    def find(self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool) -> list[Hit]:
        types = OWN | self._facts.plan.column_types
        own = {name: kind for name, kind in types.items() if name in self._facts.columns}
        met = None if where is None else to_filter(where, own)
        try:
            return self._asked_for(embedding, top_k, met, thumbnails)
        except RAdapterError as error:
            print(f"the index {self._place.name}: {error}", file=sys.stderr)
            why = public(str(error).partition(" can't be used: ")[2]) or "it is gone from Qdrant"
            raise TaskError(UNKNOWN_INDEX, f"the index {self._place.name} can't be searched in Qdrant: {why}") from None

    def _asked_for(
        self, embedding: NDArray[np.float32], top_k: int, met: models.Filter | None, thumbnails: bool
    ) -> list[Hit]:
        exact = self._facts.count <= EXACT
        with qdrant_errors(self._place.url):
            points = (
                self._place.client()
                .query_points(
                    self._name,
                    query=np.asarray(embedding, np.float32).tolist(),
                    query_filter=met,
                    search_params=models.SearchParams(exact=exact, hnsw_ef=max(128, 2 * top_k)),
                    limit=top_k,
                    with_payload=True if thumbnails else models.PayloadSelectorExclude(exclude=[THUMBNAIL]),
                )
                .points
            )
            return [self._hit(point, thumbnails) for point in points]

    def _hit(self, point: Any, thumbnails: bool) -> Hit:
        metadata = {name: point.payload[name] for name in self._facts.columns}
        thumbnail = base64.b64decode(point.payload.get(THUMBNAIL) or "") if thumbnails else b""
        return Hit(str(metadata["path"]), float(point.score), metadata, thumbnail)
