"""The indexes of a folder, each opened once a generation, with the release that made it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.contract.errors import INDEX_MISMATCH, UNKNOWN_INDEX, TaskError, redact
from radapter_serve.contract.labels import is_name, spellings, there_are
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_name, as_text
from radapter_serve.index.facts import FACTS, build_command, index_names, mismatch
from radapter_serve.index.index import Index, current, link_of, open_index

POLL = 5.0  # seconds between two questions to Qdrant for the current generation
OPENING = 60.0  # seconds that a server waits for its indexes before it is ready
TRY_AGAIN = 10.0  # seconds after which an index that could not be opened is tried again


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
