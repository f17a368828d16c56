"""An index: a folder of embeddings with metadata that one release made, and that is searched by
cosine.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError, invalid
from radapter_serve.contract.labels import check_length
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text
from radapter_serve.index.facts import FACTS, IndexFacts, MadeBy
from radapter_serve.index.folder import open_generation, read_pointer
from radapter_serve.index.qdrant import Collection, Qdrant
from radapter_serve.index.table import UNIT, Hit, Table
from radapter_serve.release.release import Release

LINK = "at"  # the one fact in the index.json of a folder that links to a published index
MAX_TOP_K = 1000


class Index:
    """A generation of an index, which never changes."""

    def __init__(
        self, folder: Path, generation: str, facts: IndexFacts, store: Table | Collection
    ) -> None:
        self.folder = folder
        self.generation = generation
        self.facts = facts
        self._store = store

    def __len__(self) -> int:
        return self.facts.count

    def rows(self, columns: list[str], batch: int) -> Iterator[Any]:
        """Columns of all images, `vector` among them, as Arrow record batches."""
        return self._store.rows(columns, batch)

    def search(
        self,
        embedding: NDArray[np.float32],
        top_k: int = 10,
        where: str | None = None,
        *,
        thumbnails: bool = False,
        offset: int | None = None,
        min_score: float | None = None,
    ) -> list[Hit]:
        """Find the nearest images, best first; images with equal vectors come in the order of their
        ids.

        With an `offset`, the images are a page of the 1000 nearest: such pages, put together, are
        as one large page. In a big index, a search without `offset` looks less deep. `where` is a
        condition in SQL on the columns; hits with a cosine below `min_score` are left out.
        """
        if not 1 <= top_k <= MAX_TOP_K:
            raise invalid(f"top_k is {top_k}; allowed are whole numbers from 1 to {MAX_TOP_K}")
        if offset is not None and not 0 <= offset <= MAX_TOP_K:
            raise invalid(f"offset is {offset}; allowed are whole numbers from 0 to {MAX_TOP_K}")
        if min_score is not None and not -1 <= min_score <= 1:
            raise invalid(f"min_score is {min_score:g}; allowed are numbers from -1 to 1")
        condition = where if where and where.strip() else None
        # What is found may depend on how deep a search looks, so all pages look equally deep.
        depth = top_k if offset is None else MAX_TOP_K
        hits = self._store.find(embedding, depth, condition, thumbnails=thumbnails)
        for hit in hits:
            if not abs(hit.score) <= 1 + UNIT:
                raise self._damaged(f"gives {hit.id!r:.200} the score {hit.score:g}")
        if min_score is not None:
            hits = [hit for hit in hits if hit.score >= min_score]
        hits = sorted(hits, key=lambda hit: (-hit.score, hit.id))
        if offset is None:
            return hits
        if offset > len(hits):
            raise invalid(f"offset is {offset}, past the end; this search finds {len(hits)} images")
        return hits[offset : offset + top_k]

    def embeddings(self, ids: Sequence[str]) -> list[NDArray[np.float32]]:
        """The embeddings of images, float32 [D] each, unit length."""
        for id in ids:
            check_length(id, what="name of an image")
        vectors = self._store.embeddings(list(dict.fromkeys(ids)))
        for id in ids:
            if id not in vectors:
                name = as_text(self.folder.name)
                raise invalid(f"the index {name!r} has no image {id!r:.200}")
            if not abs(np.linalg.norm(vectors[id]) - 1) < UNIT:
                raise self._damaged(f"has no unit length for {id!r:.200}")
        return [vectors[id] for id in ids]

    def _damaged(self, why: str) -> TaskError:
        name = as_text(self.folder.name)
        print(f"the index {name} {why}; see radapter-index verify", file=sys.stderr)
        return TaskError(
            UNKNOWN_INDEX,
            f"the index {name} can't be searched: a file is damaged; the server's log says why",
        )


def open_index(folder: str | Path, *, complete: bool = False) -> Index:
    """The index of a folder, as it is now: what the folder holds, or what it links to. `complete`
    compares all its files with their digests, however large.
    """
    folder = Path(folder)
    store: Table | Collection
    if url := link_of(folder):
        generation, facts = Qdrant(url).current()
        store = Collection(Qdrant(url), generation, facts)
    else:
        generation, facts = read_pointer(folder)
        store = open_generation(folder, generation, facts, complete=complete)
    return Index(folder, generation, facts, store)


def current(folder: Path) -> tuple[str, IndexFacts]:
    """The name of the current generation of a folder, or of the collection that it links to, and
    the facts of the index.
    """
    url = link_of(folder)
    return Qdrant(url).current() if url else read_pointer(folder)


def releases_of(indexes: Path) -> dict[str, MadeBy]:
    """The releases that made the indexes of a folder, by the names of these; what can't be read is
    left out.
    """
    releases = {}
    for path in sorted(indexes.glob(f"*/{FACTS}")):
        name = as_text(path.parent.name)
        with contextlib.suppress(RAdapterError):  # a broken one is refused when it is asked for
            if name[0] != ".":
                releases[name] = current(path.parent)[1].plan.release
    return releases


def outdated(indexes: Path, release: Release) -> dict[str, bool]:
    """Whether another release than this, the default of callers, made the indexes of a folder, by
    their names; those that can't be read are left out.
    """
    return {name: not made.is_of(release) for name, made in releases_of(indexes).items()}


def link_of(folder: Path) -> str:
    """The address of the published index that a folder links to, or an empty text."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads((folder / FACTS).read_bytes())[LINK])
    return ""
