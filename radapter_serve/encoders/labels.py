"""Label sets with their text embeddings, and the embeddings of labels that requests bring."""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text, staged

DEFAULT_WEIGHT = 0.5  # of a label's examples; the rest is its text's
MAX_EXAMPLES = 128  # of a request, and of a label set that is embedded again
_TEXTS = ("labels", "lines", "templates")  # of a label set
MAX_LABELS = 20_000  # whose embeddings are kept
_WAIT = 0.5  # seconds for another process that writes
_KEYS = 500  # of a query; SQLite takes at least 999 values
_TABLE = """CREATE TABLE IF NOT EXISTS labels
    (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, embed BLOB NOT NULL)"""
_OLD = "DELETE FROM labels WHERE number <= (SELECT MAX(number) FROM labels) - ?"


@dataclass(frozen=True)
class Examples:
    """Encoded images that show some labels of a list."""

    images: tuple[bytes, ...]
    labels: tuple[int, ...]  # of each example, the place of its label in the list
    # Of the examples of a label, in [0, 1]: one for all labels, or one for each.
    weights: tuple[float, ...] = (DEFAULT_WEIGHT,)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each image."""
        return tuple(hashlib.sha256(image).digest() for image in self.images)


@dataclass(frozen=True)
class LabelSet:
    """Classes and their embeddings, and what it takes to embed them again."""

    labels: tuple[str, ...]  # names to show, C of them
    embeds: NDArray[np.float32]  # [C, D], unit length, those of examples mixed in
    lines: tuple[str, ...]  # the labels with their synonyms
    templates: tuple[str, ...]
    examples: Examples | None = None  # those mixed in

    def save(self, path: str | Path) -> None:
        """Write all of it as npz, in one piece or not at all."""
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, name), dtype=np.str_) for name in _TEXTS
        }
        if self.examples is not None:
            arrays |= {
                "examples": np.frombuffer(b"".join(self.examples.images), np.uint8),
                "example_sizes": np.array([len(image) for image in self.examples.images]),
                "example_labels": np.array(self.examples.labels),
                "example_weights": np.array(self.examples.weights),
            }
        with staged(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, embeds=np.asarray(self.embeds, np.float32), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Read what `save` wrote; more examples than an export writes are refused."""
        with np.load(path, allow_pickle=False) as file:
            values: dict[str, Any] = {name: tuple(file[name].tolist()) for name in _TEXTS}
            embeds = np.ascontiguousarray(file["embeds"], np.float32)
            if "examples" not in file:
                return cls(embeds=embeds, **values)
            sizes = file["example_sizes"]
            if sizes.size > MAX_EXAMPLES:
                raise RAdapterError(
                    f"{path} has {sizes.size} examples; at most {MAX_EXAMPLES} are allowed; export"
                    " it again with radapter-export"
                )
            whole = file["examples"].tobytes()
            ends = np.cumsum(sizes).tolist()
            images = tuple(whole[start:end] for start, end in itertools.pairwise([0, *ends]))
            labels = tuple(file["example_labels"].tolist())
            weights = tuple(file["example_weights"].tolist())
            return cls(embeds=embeds, **values, examples=Examples(images, labels, weights))


def load_label_sets(folder: Path) -> dict[str, LabelSet]:
    """All `NAME.npz` of a folder by name; empty if there is no such folder."""
    return {as_text(path.stem): LabelSet.load(path) for path in sorted(folder.glob("*.npz"))}


class LabelCache:
    """Embeddings of labels and examples by key, and the label sets that requests brought.

    Embeddings are in a file of SQLite that several processes share, or in memory (`file` None):
    those of `max_labels` at most, and the oldest go first. This is a cache and no more: where its
    file can't be read or written, it is empty, and the log says why. `max_labels` also bounds how
    many labels and templates the label sets have together. `release` is a part of every key.
    """

    def __init__(
        self, release: str, file: Path | None = None, *, max_labels: int = MAX_LABELS
    ) -> None:
        self._release = release
        self._file = file
        self._max_labels = max_labels
        self._file_lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._complained = False
        self._lock = threading.Lock()
        # Callers mostly send the same list again; this saves them the walk through it.
        self._sets: OrderedDict[Any, LabelSet] = OrderedDict()
        self._texts_in_sets = 0

    def key(self, *parts: Any) -> bytes:
        """The key of an embedding."""
        return hashlib.sha256(repr((self._release, *parts)).encode()).digest()

    def embeddings(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The embeddings, float32 [D], that are kept of some keys."""
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

    def keep(self, embeds: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keep embeddings, float32 [D] each, by key; all of them, or where that fails none."""
        rows = [(key, embed.tobytes()) for key, embed in embeds.items()]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(
                    "INSERT OR IGNORE INTO labels (key, embed) VALUES (?, ?)", rows
                )
                connection.execute(_OLD, (self._max_labels,))

        self._try(write)

    def get(self, key: Any) -> LabelSet | None:
        """The label set of a list of labels, if it was asked for before."""
        with self._lock:
            if key in self._sets:
                self._sets.move_to_end(key)
            return self._sets.get(key)

    def put(self, key: Any, label_set: LabelSet) -> None:
        """Keep a label set; the oldest go."""
        with self._lock:
            if key in self._sets:  # another thread was quicker
                return
            self._sets[key] = label_set
            self._texts_in_sets += _texts_of(label_set)
            while len(self._sets) > 1 and self._texts_in_sets > self._max_labels:
                _, dropped = self._sets.popitem(last=False)
                self._texts_in_sets -= _texts_of(dropped)

    def _try(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Read from the file or write into it."""
        with self._file_lock:
            try:
                if self._connection is None:
                    file = ":memory:" if self._file is None else self._file
                    connection = sqlite3.connect(file, timeout=_WAIT, check_same_thread=False)
                    weakref.finalize(self, connection.close)
                    # Those who read and those who write do not wait for each other; a machine that
                    # fails may lose what is kept.
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = OFF")
                    connection.execute(_TABLE)
                    self._connection = connection
                work(self._connection)
            except sqlite3.Error as error:
                if not self._complained:
                    print(f"embeddings of labels are not kept: {error}", file=sys.stderr)
                self._complained = True


def _texts_of(label_set: LabelSet) -> int:
    return len(label_set.labels) + len(label_set.templates)
