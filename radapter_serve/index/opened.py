"""The indexes of a folder, each opened once a generation."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError
from radapter_serve.contract.names import is_name, spellings, there_are
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_name
from radapter_serve.index.facts import FACTS, index_names
from radapter_serve.index.index import Index, link_of, open_index, place_of

POLL = 5.0  # seconds between two questions to Qdrant for the current generation
OPENING = 60.0  # seconds that a server waits for its indexes before it is ready
TRY_AGAIN = 10.0  # seconds after which an index that could not be opened is tried again


@dataclass
class _Opened:
    """The result of opening an index."""

    pointer: bytes  # the text of the folder's `index.json`
    index: Index | None  # None if it can't be opened
    asked: float  # time at which it was opened, or Qdrant was asked last


class OpenIndexes:
    """The indexes of a folder. A new one is found, and a replaced one is opened again.

    A generation never changes, so a caller's index stays whole. `index.json`, which names the
    generation, is read once a call.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[str, _Opened] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def open_all(self, seconds: float = OPENING) -> None:
        """Open every index of the folder, so that no caller waits for it. A broken one is named in
        the log, and tried again when a caller asks for it. After `seconds`, those that are not open
        yet, such as in a Qdrant that does not answer, are left to threads in the background.
        """

        def open_one(name: str) -> None:
            with contextlib.suppress(TaskError):
                self.get(name)

        threads = [
            threading.Thread(target=open_one, args=(name,), daemon=True)
            for name in index_names(self._folder)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def get(self, name: str) -> Index:
        """The index of that name as it is now."""
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
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # requests to other indexes don't wait while this one is opened
            index = self._opened(name, folder, pointer)
        if index is None:
            raise TaskError(
                UNKNOWN_INDEX, f"the index {name!r} can't be opened; the server's log says why"
            )
        return index

    def _opened(self, name: str, folder: Path, pointer: bytes) -> Index | None:
        known = self._known.get(name)
        if known is not None and known.pointer != pointer:
            known = None
        if known is not None and not self._is_outdated(known, folder):
            return known.index
        index = known.index if known is not None else None
        try:
            index = open_index(folder)
        except RAdapterError as error:
            # If what a link names now is broken, what it named before stays open.
            print(error, file=sys.stderr)
        self._known[name] = _Opened(pointer, index, self._clock())
        return index

    def _is_outdated(self, known: _Opened, folder: Path) -> bool:
        """Whether to open an index again whose pointer is the same."""
        if known.index is None:
            return self._clock() - known.asked > TRY_AGAIN
        if not link_of(folder) or self._clock() - known.asked < POLL:
            return False
        try:
            generation, _ = place_of(folder).current()
        except RAdapterError:  # while Qdrant does not answer, the index stays open
            return False
        finally:
            known.asked = self._clock()  # after the answer, which may take longer than POLL
        return generation != known.index.generation
