"""The embeddings of labels, kept for all processes of a server."""

from __future__ import annotations

import sqlite3
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_LABELS = 20_000
_WAIT = 0.5  # seconds for another process that writes
_KEYS = 500  # of a query; SQLite takes at least 999 values
_TABLE = """CREATE TABLE IF NOT EXISTS labels
    (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, embed BLOB NOT NULL)"""
_OLD = "DELETE FROM labels WHERE number <= (SELECT MAX(number) FROM labels) - ?"


class LabelStore:
    """Embeddings by key, in a file of SQLite that several processes share, or in memory (None).

    It holds those of `max_labels` at most, and the oldest go first. It is a cache and no more:
    where its file cannot be read or written, it is empty, and the log says why.
    """

    def __init__(self, file: Path | None = None, *, max_labels: int = MAX_LABELS) -> None:
        self._file = file
        self.max_labels = max_labels
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._complained = False

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The embeddings, float32 [D], of those keys that it has."""
        embeds: dict[bytes, NDArray[np.float32]] = {}

        def read(connection: sqlite3.Connection) -> None:
            for start in range(0, len(keys), _KEYS):
                some = keys[start : start + _KEYS]
                places = ", ".join("?" * len(some))
                query = f"SELECT key, embed FROM labels WHERE key IN ({places})"
                for key, embed in connection.execute(query, some):
                    embeds[key] = np.frombuffer(embed, np.float32)

        self._try(read)
        return embeds

    def put(self, embeds: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keep embeddings, float32 [D] each, by key; all of them, or where that fails none."""
        rows = [(key, embed.tobytes()) for key, embed in embeds.items()]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(
                    "INSERT OR IGNORE INTO labels (key, embed) VALUES (?, ?)", rows
                )
                connection.execute(_OLD, (self.max_labels,))

        self._try(write)

    def _try(self, work: Callable[[sqlite3.Connection], None]) -> None:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                work(self._connection)
            except sqlite3.Error as error:
                if not self._complained:
                    print(f"embeddings of labels are not kept: {error}", file=sys.stderr)
                self._complained = True

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            ":memory:" if self._file is None else self._file,
            timeout=_WAIT,
            check_same_thread=False,
        )
        weakref.finalize(self, connection.close)
        # Those who read and those who write do not wait for each other; a machine that fails may
        # lose what is kept.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_TABLE)
        return connection
