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
from radapter_serve.index.met import prepare

POLL = 5.0  # seconds between two questions to a storage for the generation that counts
OPENING = 60.0  # seconds that a server waits for its indexes before it is ready
TRY_AGAIN = 10.0  # seconds after which an index that could not be opened is tried again


@dataclass
class _Opened:
    """What became of opening an index.

    Args:
        pointer: what the folder's `index.json` said.
        index: the index, or None where it can't be opened.
        asked: when it was opened, or the storage was asked last, in seconds.
    """

    pointer: bytes
    index: Index | None
    asked: float


class OpenIndexes:
    """The indexes of a folder: one that appears there is found, one that is replaced is opened
    again.

    A generation never changes, so what a caller holds stays whole. `index.json`, which names the
    generation, is read once a call.

    Args:
        folder: of index folders.
        clock: seconds that only grow.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[str, _Opened] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def open_all(self, seconds: float = OPENING) -> None:
        """Open every index of the folder, so that no caller waits for it; one that is broken is
        said in the log and tried again when it is asked for.

        Args:
            seconds: after which those that are not open yet, such as on a storage that does not
                answer, are left to a thread of their own.
        """
        threads = [
            threading.Thread(target=self._open, args=(name,), daemon=True)
            for name in index_names(self._folder)
        ]
        for thread in threads:
            thread.start()
        if threads:
            prepare()
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _open(self, name: str) -> None:
        with contextlib.suppress(TaskError):
            self.get(name)

    def get(self, name: str) -> Index:
        """The index of that name as it is now.

        Raises:
            TaskError: no such index, or one that can't be opened.
        """
        if not is_name(name):
            raise TaskError(UNKNOWN_INDEX, f"{name!r:.80} is no name of an index{self._names()}")
        found = self._find(name)
        if found is None:
            self._known.pop(name, None)
            raise TaskError(UNKNOWN_INDEX, f"no index {name!r:.80}{self._names()}")
        with self._lock:
            own = self._locks.setdefault(name, threading.Lock())
        with own:  # opening a big index takes seconds, for which requests to others should not wait
            index = self._opened(name, *found)
        if index is None:
            raise TaskError(
                UNKNOWN_INDEX, f"the index {name!r} can't be opened; the server's log says why"
            )
        return index

    def _find(self, name: str) -> tuple[Path, bytes] | None:
        """The folder of an index, and what its `index.json` says; None where there is none."""
        for spelling in spellings(name):
            folder = self._folder / as_name(spelling)
            with contextlib.suppress(OSError):
                return folder, (folder / FACTS).read_bytes()
        return None

    def _opened(self, name: str, folder: Path, pointer: bytes) -> Index | None:
        known = self._known.get(name)
        same = known is not None and known.pointer == pointer
        if known is not None and same and not self._is_outdated(known, folder):
            return known.index
        index = known.index if known is not None and same else None
        try:
            index = open_index(folder)
        except RAdapterError as error:
            # If the index that a link names now is broken, the one that it named before stays open.
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
        except RAdapterError:  # who can't ask goes on with what there is
            return False
        finally:
            known.asked = self._clock()  # after the answer, which may take longer than that
        return generation != known.index.generation

    def _names(self) -> str:
        return there_are(index_names(self._folder), "radapter-index build makes them")
