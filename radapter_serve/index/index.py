"""An index, a folder of embeddings with metadata that one release made, searched by cosine; and
those that a server has open.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    INDEX_MISMATCH,
    UNKNOWN_INDEX,
    TaskError,
    invalid,
    redact,
)
from radapter_serve.contract.labels import check_length, is_name, spellings, there_are
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_name, as_text
from radapter_serve.index.facts import (
    FACTS,
    IndexFacts,
    MadeBy,
    build_command,
    index_names,
    mismatch,
)
from radapter_serve.index.folder import UNIT, Hit, Table, open_generation, read_pointer
from radapter_serve.index.qdrant import Collection, Qdrant

LINK = "at"  # the one fact in the index.json of a folder that links to a published index
MAX_TOP_K = 1000
POLL = 5.0  # seconds between two questions to Qdrant for the current generation
OPENING = 60.0  # seconds that a server waits for its indexes before it is ready
TRY_AGAIN = 10.0  # seconds after which an index that could not be opened is tried again


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
    if url := link_of(folder):
        generation, facts = Qdrant(url).current()
        return Index(folder, generation, facts, Collection(Qdrant(url), generation, facts))
    table = open_generation(folder, complete=complete)
    return Index(folder, table.folder.name, table.facts, table)


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


def link_of(folder: Path) -> str:
    """The address of the published index that a folder links to, or an empty text."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads((folder / FACTS).read_bytes())[LINK])
    return ""


@dataclass
class _Opened:
    """The result of opening an index."""

    pointer: bytes  # the text of the folder's `index.json`
    index: Index | None  # None if it can't be opened
    asked: float  # time at which it was opened, or Qdrant was asked last


class Indexes:
    """The indexes of the folder of a release. A new one is seen, and a replaced one opened again.

    An index belongs to the release that made it: this one, or one of the `others` that are served.
    All are opened at once, so that no caller waits; a broken one is named in the log, and tried
    again when a caller asks for it. Those that are not open after `opening` seconds, such as in a
    Qdrant that does not answer, are left to threads in the background.
    """

    def __init__(
        self,
        loaded: LoadedRelease,
        others: Callable[[], Iterable[LoadedRelease]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        opening: float = OPENING,
    ) -> None:
        self._loaded = loaded
        self._others = others
        self._folder = loaded.indexes
        self._clock = clock
        self._known: dict[str, _Opened] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._logged: set[str] = set()  # generations for which the log has the command

        def open_one(name: str) -> None:
            with contextlib.suppress(TaskError):
                self._current(name)

        threads = [
            threading.Thread(target=open_one, args=(name,), daemon=True)
            for name in index_names(self._folder)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + opening
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def get(self, name: str) -> tuple[Index, LoadedRelease]:
        """The index of a name as it is now, and the release that made it; raises a `TaskError`
        where it can't be read, or its release is not served.
        """
        index = self._current(name)
        made_by = index.facts.plan.release
        if made_by.is_of(self._loaded.release):
            return index, self._loaded
        for loaded in self._others():
            if made_by.is_of(loaded.release):
                return index, loaded
        shown = as_text(index.folder.name)
        release = self._loaded.release
        why = mismatch(made_by, release)
        if index.generation not in self._logged:
            self._logged.add(index.generation)
            if link := link_of(index.folder):
                again = f"build the index that was published to {link} again, and publish that"
            else:
                command = build_command(
                    index.folder.absolute(), index.facts.plan, release, self._loaded.origin
                )
                again = f"build it again: {command}"
            print(f"the index {shown!r} {why}; {again}", file=sys.stderr)
        raise TaskError(
            INDEX_MISMATCH,
            f"the index {shown!r} {redact(why)}; the server's log has the command that builds it"
            " again",
        )

    def _current(self, name: str) -> Index:
        """The current generation of an index, which never changes; `index.json`, which names it, is
        read once a call.
        """
        names = there_are(index_names(self._folder), "radapter-index build makes them")
        if not is_name(name):
            raise TaskError(UNKNOWN_INDEX, f"{name!r:.80} is no name of an index{names}")
        for spelling in spellings(name):
            folder = self._folder / as_name(spelling)
            with contextlib.suppress(OSError):
                pointer = (folder / FACTS).read_bytes()
                break
        else:
            self._known.pop(name, None)
            raise TaskError(UNKNOWN_INDEX, f"no index {name!r:.80}{names}")
        # Requests to other indexes don't wait while this one is opened.
        with self._locks.setdefault(name, threading.Lock()):
            known = self._known.get(name)
            if known is None or known.pointer != pointer:
                known = _Opened(pointer, None, 0.0)
                is_outdated = True
            else:
                is_outdated = self._is_outdated(known, folder)
            if is_outdated:
                index = known.index
                try:
                    index = open_index(folder)
                except RAdapterError as error:
                    # If what a link names now is broken, what it named before stays open.
                    print(error, file=sys.stderr)
                known = _Opened(pointer, index, self._clock())
                self._known[name] = known
        if known.index is None:
            raise TaskError(
                UNKNOWN_INDEX, f"the index {name!r} can't be opened; the server's log says why"
            )
        return known.index

    def _is_outdated(self, known: _Opened, folder: Path) -> bool:
        """Whether to open an index again whose pointer is the same."""
        if known.index is None:
            return self._clock() - known.asked > TRY_AGAIN
        if not link_of(folder) or self._clock() - known.asked < POLL:
            return False
        try:
            generation, _ = current(folder)
        except RAdapterError:  # while Qdrant does not answer, the index stays open
            return False
        finally:
            known.asked = self._clock()  # after the answer, which may take longer than POLL
        return generation != known.index.generation
