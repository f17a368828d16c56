"""An index that a running Qdrant holds, searched as any other."""

from __future__ import annotations

import base64
import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client import models

from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text
from radapter_serve.index.bucket import GENERATION, LINK
from radapter_serve.index.filters import OWN, to_filter
from radapter_serve.index.index import EXACT, Hit, Index, check_top_k
from radapter_serve.index.qdrant import THUMBNAIL, Qdrant, qdrant_errors
from radapter_serve.inputs.errors import UNKNOWN_INDEX, TaskError, public

_MOST = 1.01  # a cosine, with room for rounding


class HostedIndex(Index):
    """An index whose vectors, metadata and thumbnails lie in Qdrant; the folder links to it."""

    def _open(self, searched: bool, complete: bool) -> None:
        self.columns = self.facts["columns"]

    def search(
        self, embedding: NDArray[np.float32], top_k: int = 10, where: str | None = None, *, thumbnails: bool = False
    ) -> list[Hit]:
        """As `Index.search`; of more than EXACT images, Qdrant's own index says which are nearest.

        Raises:
            TaskError: `top_k` or the condition is not allowed, or Qdrant does not answer as it should.
        """
        check_top_k(top_k)
        types = {name: kind for name, kind in (OWN | self.facts["column_types"]).items() if name in self.columns}
        met = to_filter(where, types) if where and where.strip() else None
        try:
            hits = self._asked_for(embedding, top_k, met, thumbnails)
        except RAdapterError as error:
            print(f"the index {as_text(self.folder.name)}: {error}", file=sys.stderr)
            why = public(str(error).partition(" can't be used: ")[2]) or "it is gone from Qdrant"
            raise TaskError(
                UNKNOWN_INDEX, f"the index {as_text(self.folder.name)} can't be searched in Qdrant: {why}"
            ) from None
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def _asked_for(
        self, embedding: NDArray[np.float32], top_k: int, met: models.Filter | None, thumbnails: bool
    ) -> list[Hit]:
        place = Qdrant(self.facts[LINK])
        with qdrant_errors(place.url):
            client = place.client()
            points = client.query_points(
                self.facts[GENERATION],
                query=np.asarray(embedding, np.float32).tolist(),
                query_filter=met,
                search_params=models.SearchParams(exact=len(self) <= EXACT, hnsw_ef=max(128, 2 * top_k)),
                limit=top_k,
                with_payload=True if thumbnails else models.PayloadSelectorExclude(exclude=[THUMBNAIL]),
            ).points
            if len(points) > top_k:
                raise ValueError("more points than were asked for")
            return [self._hit(point, thumbnails) for point in points]

    def _hit(self, point: Any, thumbnails: bool) -> Hit:
        """What a point is.

        Raises:
            KeyError, TypeError, ValueError: it is not one of an index.
        """
        metadata = {name: point.payload[name] for name in self.columns}
        if not math.isfinite(point.score) or abs(point.score) > _MOST or not isinstance(metadata["path"], str):
            raise ValueError("no hit")
        thumbnail = base64.b64decode(point.payload.get(THUMBNAIL) or "", validate=True) if thumbnails else b""
        return Hit(metadata["path"], float(point.score), metadata, thumbnail)
