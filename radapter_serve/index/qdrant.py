"""Indexes in a running Qdrant: published as a whole, opened read-only by any number of servers.

The alias COLLECTION names the collection that counts, whose metadata hold the index's facts; to
switch the alias is to replace the index. The key comes from the environment alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError, redact
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.folder import GENERATION
from radapter_serve.index.table import EXACT, THUMBNAIL, Hit

KEYS = ("RADAPTER_QDRANT_API_KEY", "QDRANT_API_KEY")
FACTS_KEY = "radapter_index"  # of the collection's metadata: the facts, as JSON
TIMEOUT = 10  # seconds for a search, and for a switch of the alias
_PORT = 6333
_PLACE = re.compile(
    r"qdrant(s?)://(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::([0-9]{1,5}))?/(\w[\w.-]{0,150})/?", re.ASCII
)


@dataclass(frozen=True)
class Qdrant:
    """The place of an index in a running Qdrant.

    Args:
        url: `qdrant://HOST:PORT/COLLECTION`, or `qdrants://` for TLS.

    Raises:
        RAdapterError: it is no such place.
    """

    url: str

    def __post_init__(self) -> None:
        match = _PLACE.fullmatch(self.url)
        if match is None or not 0 < int(match[3] or _PORT) < 65536:
            raise RAdapterError(
                f"{self.url.rpartition('@')[2]!r:.200} is no place of an index; allowed:"
                " qdrant://HOST:PORT/COLLECTION (qdrants:// for TLS), and names of letters,"
                " digits, _, - and ."
            )

    @property
    def name(self) -> str:
        """The alias of the index."""
        return self._parts[3]

    @property
    def _parts(self) -> tuple[str, str, str, str]:
        match = _PLACE.fullmatch(self.url)
        assert match is not None  # as it was made
        return match[1], match[2], match[3] or str(_PORT), match[4]

    def client(self, timeout: int | None = None) -> Any:
        """A client of qdrant-client's, for who may use it by the environment.

        Args:
            timeout: of a request, in seconds; TIMEOUT if None.

        Raises:
            RAdapterError: qdrant-client is not installed.
        """
        secure, host, port, _ = self._parts
        key = next((value for name in KEYS if (value := os.environ.get(name))), None)
        check_installed("qdrant_client", "qdrant")
        return _connected(f"http{secure}://{host}:{port}", key, timeout or TIMEOUT)

    def current(self) -> tuple[str, IndexFacts]:
        with qdrant_errors(self.url):
            config = self.client().get_collection(self.name).config
        try:
            values = json.loads((config.metadata or {})[FACTS_KEY])
            generation = values.pop(GENERATION)
            facts = IndexFacts.from_json(json.dumps(values))
            if not is_collection_of(self.name, generation):
                raise ValueError(f"{GENERATION} is {generation!r:.100}")
            if "path" not in facts.columns:
                raise ValueError(f"columns are {facts.columns!r:.100}")
            size = config.params.vectors.size
            if size != facts.plan.release.embed_dim:
                raise ValueError(
                    f"its vectors have the width {size} in place of {facts.plan.release.embed_dim}"
                )
        except KeyError as error:
            raise self._broken(f"it lacks {error}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._broken(f"{error}") from None
        return generation, facts

    def open(self, generation: str, facts: IndexFacts, *, complete: bool) -> Collection:
        check_installed("qdrant_client", "qdrant")
        return Collection(self, generation, facts)

    def _broken(self, why: str) -> RAdapterError:
        return RAdapterError(
            f"{self.url} holds no index that can be read ({why:.200}); publish it again:"
            f" radapter-index publish INDEX {self.url}"
        )


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
            f"{self._place.url} is an index in Qdrant, which can only be searched and shown; give"
            " the index that was published"
        )

    def find(
        self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool
    ) -> list[Hit]:
        from radapter_serve.index.filters import OWN, to_filter  # here: others need no client

        types = OWN | self._facts.plan.column_types
        own = {name: kind for name, kind in types.items() if name in self._facts.columns}
        met = None if where is None else to_filter(where, own)
        with self._search_errors():
            return self._asked_for(embedding, top_k, met, thumbnails)

    def embeddings(self, ids: list[str]) -> dict[str, NDArray[np.float32]]:
        from qdrant_client import models

        any_of = models.FieldCondition(key="path", match=models.MatchAny(any=ids))
        with self._search_errors(), qdrant_errors(self._place.url):
            points, _ = self._place.client().scroll(
                self._name,
                scroll_filter=models.Filter(must=[any_of]),
                limit=len(ids),
                with_payload=["path"],
                with_vectors=True,
            )
            vectors = [np.array(point.vector, np.float32) for point in points]
            wanted = (self._facts.plan.release.embed_dim,)
            if any(vector.shape != wanted for vector in vectors):
                raise ValueError("a vector of another width")
            return {str(p.payload["path"]): v for p, v in zip(points, vectors, strict=True)}

    @contextlib.contextmanager
    def _search_errors(self) -> Iterator[None]:
        """Turn why a search fails into an answer for its caller, and a line in the log."""
        try:
            yield
        except RAdapterError as error:
            if isinstance(error, TaskError):
                raise
            print(f"the index {self._place.name}: {error}", file=sys.stderr)
            why = redact(str(error).partition(" can't be used: ")[2]) or "it is gone from Qdrant"
            raise TaskError(
                UNKNOWN_INDEX, f"the index {self._place.name} can't be searched in Qdrant: {why}"
            ) from None

    def _asked_for(
        self, embedding: NDArray[np.float32], top_k: int, met: Any, thumbnails: bool
    ) -> list[Hit]:
        from qdrant_client import models

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
                    with_payload=(
                        True if thumbnails else models.PayloadSelectorExclude(exclude=[THUMBNAIL])
                    ),
                )
                .points
            )
            return [self._hit(point, thumbnails) for point in points]

    def _hit(self, point: Any, thumbnails: bool) -> Hit:
        metadata = {name: point.payload[name] for name in self._facts.columns}
        thumbnail = base64.b64decode(point.payload.get(THUMBNAIL) or "") if thumbnails else b""
        return Hit(str(metadata["path"]), float(point.score), metadata, thumbnail)


def is_collection_of(name: str, collection: str) -> bool:
    """Whether a collection is one that an index's publication made."""
    return re.fullmatch(re.escape(name) + "-g-[0-9a-f]{16}", collection) is not None


@contextlib.contextmanager
def qdrant_errors(url: str) -> Iterator[None]:
    """Turn what Qdrant refuses, or how it fails, into an error for people; nothing that it wrote is
    repeated.
    """
    try:
        yield
    except RAdapterError:
        raise
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status == 404:
            raise RAdapterError(
                f"no index at {url}; put one there: radapter-index publish INDEX {url}"
            ) from None
        source = getattr(error, "source", error)  # which its client wraps
        why = f"its answer makes no sense ({type(source).__name__})"
        if isinstance(status, int):
            why = f"it answers HTTP {status}" + (f"; see {KEYS[0]}" if status in (401, 403) else "")
        elif type(source).__module__.split(".")[0] == "httpx":
            why = f"it does not answer as it should ({type(source).__name__}{_said(source)})"
        raise RAdapterError(f"{url} can't be used: {why}") from None


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:120]
    return f": {text}" if text.isprintable() and text else ""


@lru_cache(8)  # one keeps its connections
def _connected(url: str, key: str | None, timeout: int) -> Any:
    from qdrant_client import QdrantClient

    headers = {"api-key": key} if key else {}
    return QdrantClient(
        url=url, headers=headers, timeout=timeout, check_compatibility=False, trust_env=False
    )
