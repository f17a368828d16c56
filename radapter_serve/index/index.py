"""Opens the index of a folder, wherever it is stored; and holds the indexes of a server."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.contract.errors import (
    INDEX_MISMATCH,
    UNKNOWN_INDEX,
    Cancelled,
    TaskError,
    redact,
)
from radapter_serve.contract.labels import is_name, spellings
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_name, as_text
from radapter_serve.index.facts import (
    FACTS,
    OPENING_SECONDS,
    Index,
    IndexFacts,
    MadeBy,
    in_thread,
    index_names,
    wait_for,
)
from radapter_serve.index.folder import FolderIndex, read_pointer
from radapter_serve.index.qdrant import Qdrant, QdrantIndex, link_of
from radapter_serve.release.release import IN_BF16

POLL = 5.0  # seconds between requests to Qdrant for the current generation
TRY_AGAIN = 10.0  # seconds before an index that could not be opened is tried again


def open_index(folder: str | Path) -> Index:
    """Open the current index of a folder, or the published one that the folder links to."""
    folder = Path(folder)
    url = link_of(folder)
    return QdrantIndex(folder, url) if url else FolderIndex(folder)


def current(folder: Path) -> tuple[str, IndexFacts]:
    """Name and facts of the current generation of a folder, or of the one that it links to."""
    url = link_of(folder)
    return Qdrant(url).current() if url else read_pointer(folder)


def releases_of(indexes: Path) -> dict[str, MadeBy]:
    """Find the release that made each readable index of a folder, by the index's name."""
    releases = {}
    for path in sorted(indexes.glob(f"*/{FACTS}")):
        name = as_text(path.parent.name)
        with contextlib.suppress(RAdapterError):  # a search in a broken index reports its error
            if name[0] != ".":
                releases[name] = current(path.parent)[1].plan.release
    return releases


@dataclass
class _Opened:
    """The result of opening an index."""

    pointer: bytes  # the text of the folder's `index.json`
    index: Index | None  # None if it could not be opened
    opened_at: float  # by the clock
    error: str  # the logged error; empty if it was opened


class Indexes:
    """The indexes in a release's folder, opened at the start, for which it waits `opening_seconds`,
    and again when they are replaced. Each was made by `loaded` or by one of the `others` that are
    served.
    """

    def __init__(
        self,
        loaded: LoadedRelease,
        others: Callable[[], Iterable[LoadedRelease]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        opening_seconds: float = OPENING_SECONDS,
    ) -> None:
        self._loaded = loaded
        self._others = others
        self._folder = loaded.indexes
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, _Opened] = {}
        self._openings: dict[str, Future[None]] = {}
        self._logged: set[str] = set()  # generations whose command the log has already
        openings = []
        for name in index_names(self._folder):
            with contextlib.suppress(TaskError):  # it was removed just now
                openings.append(self._look(name))
        # Some go on, such as with a Qdrant that does not answer.
        wait([opening for opening in openings if isinstance(opening, Future)], opening_seconds)

    def get(self, name: str, cancelled: Cancelled | None = None) -> tuple[Index, LoadedRelease]:
        """Return the current index of a name, and the served release that made it."""
        index = self._current(name, cancelled)
        made_by = index.facts.plan.release
        every = [self._loaded, *self._others()]
        for loaded in every:
            if made_by.is_of(loaded.release):
                return index, loaded
        for loaded in every:
            if made_by.is_near(loaded.release):
                if index.generation not in self._logged:
                    self._logged.add(index.generation)
                    print(
                        f"the index {index.name!r} was embedded in {made_by.precision}, and release"
                        f" {loaded.release.version} computes in {loaded.release.precision}; it is"
                        f" searched, as both were measured within {1 - IN_BF16.min_cosine:.0e} of"
                        " torch's cosines",
                        file=sys.stderr,
                    )
                return index, loaded
        why = f"{made_by.differs_from(self._loaded.release)}; to embed again: {index.facts.cost}"
        if index.generation not in self._logged:
            self._logged.add(index.generation)
            if isinstance(index, QdrantIndex):
                again = "build the index that was published again, and publish that"
            else:
                folder = index.folder.absolute()
                plan = index.facts.plan
                again = f"build it again: {plan.command(folder, self._loaded)}"
                if not plan.rows:
                    again += f", or first map it: {plan.map_command(folder, self._loaded)}"
            print(f"the index {index.name!r} {why}; {again}", file=sys.stderr)
        raise TaskError(
            INDEX_MISMATCH,
            f"the index {index.name!r} {redact(why)}; the server's log has the command that builds"
            " it again",
        )

    def _current(self, name: str, cancelled: Cancelled | None = None) -> Index:
        """Return the current generation of an index, through the pointer that each call reads."""
        while isinstance(known := self._look(name), Future):
            wait_for(known, cancelled)
        if known.index is None:
            raise TaskError(
                UNKNOWN_INDEX, f"the index {name!r} can't be opened; the server's log says why"
            )
        return known.index

    def _look(self, name: str) -> _Opened | Future[None]:
        """Return an opened index, or its opening, for which requests to it wait."""
        pointer = None
        for spelling in spellings(name) if is_name(name) else ():
            folder = self._folder / as_name(spelling)
            with contextlib.suppress(OSError):
                pointer = (folder / FACTS).read_bytes()
                break
        with self._lock:
            if pointer is None:
                self._known.pop(name, None)
                names = ", ".join(index_names(self._folder))
                names = names or "none (radapter-index build makes them)"
                raise TaskError(UNKNOWN_INDEX, f"no index {name!r:.80}; there are: {names}")
            known = self._known.get(name)
            if known is not None and known.pointer == pointer:
                pause = TRY_AGAIN if known.index is None else math.inf
                if isinstance(known.index, QdrantIndex):  # another may be published by now
                    pause = POLL
                if self._clock() - known.opened_at < pause:
                    return known
            if name not in self._openings:
                self._openings[name] = in_thread(lambda: self._open(name, folder, pointer))
            return self._openings[name]

    def _open(self, name: str, folder: Path, pointer: bytes) -> None:
        known = self._known.get(name)
        # If the linked generation is broken, the one before stays open.
        index = known.index if known is not None and known.pointer == pointer else None
        why = ""
        try:
            try:
                index = open_index(folder)
            except RAdapterError as error:
                why = str(error)
                if known is None or known.error != why:  # log each error once
                    print(why, file=sys.stderr)
            self._known[name] = _Opened(pointer, index, self._clock(), why)
        finally:
            with self._lock:
                del self._openings[name]
