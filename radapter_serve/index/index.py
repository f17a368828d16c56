"""An index: a folder of embeddings with metadata that one release made, and that is searched by
cosine.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError, invalid
from radapter_serve.files import as_text, staged
from radapter_serve.index.facts import FACTS, IndexFacts
from radapter_serve.index.store import Hit, Place, Store
from radapter_serve.index.store.local import Folder
from radapter_serve.index.store.qdrant import Qdrant, is_qdrant
from radapter_serve.index.store.s3 import Bucket
from radapter_serve.index.store.table import UNIT

LINK = "at"  # the one fact in the index.json of a folder that links to a published index
MAX_TOP_K = 1000


class Index:
    """A generation of an index, which never changes.

    Args:
        folder: of the index.
        generation: its name.
        facts: what is known of it.
        store: what holds it.
    """

    def __init__(self, folder: Path, generation: str, facts: IndexFacts, store: Store) -> None:
        self.folder = folder
        self.generation = generation
        self.facts = facts
        self._store = store

    def __len__(self) -> int:
        return self.facts.count

    def rows(self, columns: list[str], batch: int) -> Iterator[Any]:
        """As in `Store`."""
        return self._store.rows(columns, batch)

    def search(
        self,
        embedding: NDArray[np.float32],
        top_k: int = 10,
        where: str | None = None,
        *,
        thumbnails: bool = False,
    ) -> list[Hit]:
        """Find the nearest images, best first; images with equal vectors come in the order of their
        ids.

        Args:
            embedding: float32 [D], unit length.
            top_k: how many images at most, 1 to 1000.
            where: a condition in SQL on the columns, such as "year > 2020 AND path LIKE 'cats/%'".
            thumbnails: whether the hits have their thumbnails.

        Raises:
            TaskError: `top_k` or the condition is not allowed, or the index can't be read.
        """
        if not 1 <= top_k <= MAX_TOP_K:
            raise invalid(f"top_k is {top_k}; allowed are whole numbers from 1 to {MAX_TOP_K}")
        condition = where if where and where.strip() else None
        hits = self._store.find(embedding, top_k, condition, thumbnails=thumbnails)
        for hit in hits:
            if not abs(hit.score) <= 1 + UNIT:
                self._refuse(hit)
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def _refuse(self, hit: Hit) -> None:
        name = as_text(self.folder.name)
        see = "see radapter-index verify"
        print(
            f"the index {name} gives {hit.id!r:.200} the score {hit.score:g}; {see}",
            file=sys.stderr,
        )
        raise TaskError(
            UNKNOWN_INDEX,
            f"the index {name} can't be searched: a file is damaged; the server's log says why",
        )


def open_index(folder: str | Path, *, complete: bool = False) -> Index:
    """The index of a folder, as it is now: what the folder holds, or what it links to.

    Args:
        folder: of the index.
        complete: whether all files on this machine's disk are compared with their digests, however
            large.

    Raises:
        RAdapterError: there is no index, or a broken one.
    """
    folder = Path(folder)
    place = place_of(folder)
    generation, facts = place.current()
    return Index(folder, generation, facts, place.open(generation, facts, complete=complete))


def read_facts(folder: Path) -> IndexFacts:
    """The facts of an index, or of the published one that a folder links to.

    Raises:
        RAdapterError: there is none, or it can't be read.
    """
    _, facts = place_of(folder).current()
    return facts


def place_of(folder: Path) -> Place:
    """Where the index of a folder is."""
    url = link_of(folder)
    return published(url) if url else Folder(folder)


def published(url: str) -> Bucket | Qdrant:
    """Where a published index is.

    Raises:
        RAdapterError: the address is neither of object storage nor of Qdrant.
    """
    return Qdrant(url) if is_qdrant(url) else Bucket(url)


def link_of(folder: Path) -> str:
    """The address of the published index that a folder links to; empty where it links to
    none.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads((folder / FACTS).read_bytes())[LINK])
    return ""


def write_link(folder: Path, url: str) -> None:
    """Make a folder link to a published index; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with staged(folder / FACTS) as temporary:
        temporary.write_text(json.dumps({LINK: url}), encoding="utf-8")
