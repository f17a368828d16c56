"""Indexes in a running Qdrant: published as a whole, opened read-only by any number of servers.

The alias COLLECTION names the current collection, whose metadata hold the index's facts; to switch
the alias is to replace the index. The key comes from the environment alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
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
TIMEOUT = 10  # seconds for a search
_PORT = 6333
_PLACE = re.compile(
    r"qdrant(s?)://(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::([0-9]{1,5}))?/(\w[\w.-]{0,150})/?", re.ASCII
)


class Qdrant:
    """The place of an index in a running Qdrant: `qdrant://HOST:PORT/ALIAS`, or `qdrants://` for
    TLS.
    """

    def __init__(self, url: str) -> None:
        match = _PLACE.fullmatch(url)
        if match is None or not 0 < int(match[3] or _PORT) < 65536:
            raise RAdapterError(
                f"{url.rpartition('@')[2]!r:.200} is no place of an index; allowed:"
                " qdrant://HOST:PORT/COLLECTION (qdrants:// for TLS), and names of letters,"
                " digits, _, - and ."
            )
        self.url = url
        self.name = match[4]
        self._http = f"http{match[1]}://{match[2]}:{match[3] or _PORT}"

    def client(self, timeout: int = TIMEOUT) -> Any:
        """A client of qdrant-client's, with the key in the environment, and the timeout of a
        request in seconds.
        """
        check_installed("qdrant_client", "qdrant")
        key = next((value for name in KEYS if (value := os.environ.get(name))), None)
        return _connected(self._http, key, timeout)

    def current(self) -> tuple[str, IndexFacts]:
        """The name of the current collection, and the facts of its index."""
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
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
            raise RAdapterError(
                f"{self.url} holds no index that can be read ({why:.200}); publish it again:"
                f" radapter-index publish INDEX {self.url}"
            ) from None
        return generation, facts


class Collection:
    """A collection in a running Qdrant, by its name, which holds an index."""

    def __init__(self, place: Qdrant, name: str, facts: IndexFacts) -> None:
        self._place = place
        self._name = name
        self._facts = facts

    def rows(self, columns: Sequence[str], batch: int) -> Iterator[Any]:
        """Refuse to read the rows of all images."""
        raise RAdapterError(
            f"{self._place.url} is an index in Qdrant, which can only be searched and shown; give"
            " the index that was published"
        )

    def find(
        self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool
    ) -> list[Hit]:
        """Find the nearest images, as `Table.find`, in any order."""
        from qdrant_client import models  # here: others need no client

        from radapter_serve.index.filters import OWN, to_filter

        types = OWN | self._facts.plan.column_types
        types = {name: kind for name, kind in types.items() if name in self._facts.columns}
        met = None if where is None else to_filter(where, types)
        exact = self._facts.count <= EXACT
        payload: Any = True if thumbnails else models.PayloadSelectorExclude(exclude=[THUMBNAIL])
        with self._search_errors(), qdrant_errors(self._place.url):
            answer = self._place.client().query_points(
                self._name,
                query=np.asarray(embedding, np.float32).tolist(),
                query_filter=met,
                search_params=models.SearchParams(exact=exact, hnsw_ef=max(128, 2 * top_k)),
                limit=top_k,
                with_payload=payload,
            )
            hits = []
            for point in answer.points:
                metadata = {name: point.payload[name] for name in self._facts.columns}
                image = point.payload.get(THUMBNAIL) if thumbnails else None
                thumbnail = base64.b64decode(image or "")
                hits.append(Hit(str(metadata["path"]), float(point.score), metadata, thumbnail))
            return hits

    def embeddings(self, ids: list[str]) -> dict[str, NDArray[np.float32]]:
        """Get the embeddings of those of these images that the index has, as `Table.embeddings`."""
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
        """Reword the failure of a search for its caller, and log the reason."""
        try:
            yield
        except TaskError:
            raise
        except RAdapterError as error:
            print(f"the index {self._place.name}: {error}", file=sys.stderr)
            why = redact(str(error).partition(" can't be used: ")[2]) or "it is gone from Qdrant"
            raise TaskError(
                UNKNOWN_INDEX, f"the index {self._place.name} can't be searched in Qdrant: {why}"
            ) from None


def is_collection_of(name: str, collection: str) -> bool:
    """Whether a collection is one that an index's publication made."""
    return re.fullmatch(re.escape(name) + "-g-[0-9a-f]{16}", collection) is not None


@contextlib.contextmanager
def qdrant_errors(url: str) -> Iterator[None]:
    """Reword a refusal or failure of Qdrant's, without a word of its answer."""
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
            text = " ".join(str(source).split())[:120]
            text = f": {text}" if text.isprintable() and text else ""
            why = f"it does not answer as it should ({type(source).__name__}{text})"
        raise RAdapterError(f"{url} can't be used: {why}") from None


@lru_cache(8)  # one keeps its connections
def _connected(url: str, key: str | None, timeout: int) -> Any:
    from qdrant_client import QdrantClient

    headers = {"api-key": key} if key else {}
    return QdrantClient(
        url=url, headers=headers, timeout=timeout, check_compatibility=False, trust_env=False
    )
