"""Indexes in a running Qdrant: published as a whole, opened read-only by any number of servers.

The alias COLLECTION names the collection that counts, whose metadata hold the index's facts; to switch the alias is to
replace the index. The key comes from the environment alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.store import Store
from radapter_serve.index.store.local import GENERATION

KEYS = ("RADAPTER_QDRANT_API_KEY", "QDRANT_API_KEY")
FACTS_KEY = "radapter_index"  # of the collection's metadata: the facts, as JSON
TIMEOUT = 10  # seconds for a search, and for a switch of the alias
_PORT = 6333
_PLACE = re.compile(r"qdrant(s?)://(\[[0-9a-fA-F:]+\]|[\w.-]+)(?::([0-9]{1,5}))?/(\w[\w.-]{0,150})/?", re.ASCII)


def is_qdrant(url: str) -> bool:
    """Whether an address is one of Qdrant's."""
    return url.startswith(("qdrant://", "qdrants://"))


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
                f"{self.url.rpartition('@')[2]!r:.200} is no place of an index; allowed: qdrant://HOST:PORT/COLLECTION "
                "(qdrants:// for TLS), and names of letters, digits, _, - and ."
            )

    @property
    def name(self) -> str:
        """The alias that stands for the index."""
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
                raise ValueError(f"its vectors have the width {size} in place of {facts.plan.release.embed_dim}")
        except KeyError as error:
            raise self._broken(f"it lacks {error}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._broken(f"{error}") from None
        return generation, facts

    def open(self, generation: str, facts: IndexFacts, *, complete: bool) -> Store:
        check_installed("qdrant_client", "qdrant")
        from radapter_serve.index.store.collection import Collection  # here: others need no client

        return Collection(self, generation, facts)

    def _broken(self, why: str) -> RAdapterError:
        return RAdapterError(
            f"{self.url} holds no index that can be read ({why:.200}); publish it again: radapter-index publish INDEX "
            f"{self.url}"
        )


def collection_of(name: str, generation: str) -> str:
    """The collection of a generation."""
    return f"{name}-{generation}"


def is_collection_of(name: str, collection: str) -> bool:
    """Whether a collection is one that an index's publication made."""
    return re.fullmatch(re.escape(name) + "-g-[0-9a-f]{16}", collection) is not None


def key_of(column: str) -> str:
    """What Qdrant calls a column, which has quotes where it is not one plain word."""
    return column if re.fullmatch(r"[A-Za-z0-9_-]+", column) else f'"{column}"'


@contextlib.contextmanager
def qdrant_errors(url: str) -> Iterator[None]:
    """Turn what Qdrant refuses, or how it fails, into an error for people; nothing that it wrote is repeated."""
    try:
        yield
    except RAdapterError:
        raise
    except Exception as error:
        status = getattr(error, "status_code", None)
        if status == 404:
            raise RAdapterError(f"no index at {url}; put one there: radapter-index publish INDEX {url}") from None
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
    return QdrantClient(url=url, headers=headers, timeout=timeout, check_compatibility=False, trust_env=False)
