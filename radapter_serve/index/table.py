"""The files of an index, mapped from the disk and searched.

A generation's folder has `rows.arrow` (the columns and the thumbnails, an Arrow file),
`vectors.npy` (float32 [N, D], unit length) and, of many images, the codes by which FAISS finds the
nearest. Row n of one is row n of the others.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from radapter_serve.contract.errors import UNKNOWN_INDEX, TaskError
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.index.conditions import Met, evaluate, text_array
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.neighbours import Neighbours, Positions, near_best

ROWS = "rows.arrow"
VECTORS = "vectors.npy"
VECTOR = "vector"  # the column that `vectors.npy` holds
THUMBNAIL = "thumbnail"
EXACT = 20_000  # images up to which a search compares every vector; of more, FAISS names candidates
# Images that meet a condition, up to which a search compares each; of more, FAISS names candidates.
FEW = 4_096
UNIT = 1e-3  # tolerance of a length, and of a cosine's bounds
_CHUNK_ROWS = 1 << 16  # of a record batch: few and large ones are compared fastest
_CHUNK_BYTES = 256 << 20  # that a record batch reaches at most, but for its last part
_CONDITIONS = 64  # whose rows are remembered
_CONDITIONS_BYTES = 32 << 20


@dataclass(frozen=True)
class Hit:
    """An image that a search found."""

    id: str
    score: float  # cosine, in [-1, 1]
    metadata: dict[str, Any]  # all columns but embedding and thumbnail, ready for JSON
    thumbnail: bytes = b""  # JPEG; empty if it was not asked for, or there is none


class Table:
    """The mapped files of a generation, for any number of searches at once."""

    def __init__(
        self, name: str, folder: Path, facts: IndexFacts, *, with_codes: bool = True
    ) -> None:
        self._name = name
        self.folder = folder
        self.facts = facts
        try:
            with (folder / ROWS).open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._table = pa.ipc.open_file(pa.py_buffer(mapping)).read_all()
            self._table.validate(full=True)
            # numpy's class for mapped files makes each slice slow.
            vectors = np.asarray(np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False))
            self._columns = self._table.select(facts.columns)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise RAdapterError(f"{folder} can't be read: {reason(error):.300}") from None
        shape = (facts.count, facts.plan.release.embed_dim)
        fits = vectors.shape == shape and vectors.dtype == np.float32
        if not fits or len(self._table) != shape[0]:
            raise RAdapterError(
                f"{folder} does not hold the {shape[0]} images of width {shape[1]} that index.json"
                " names"
            )
        self.vectors: NDArray[np.float32] = vectors  # [N, D], mapped
        self._starts = np.cumsum([0, *(len(batch) for batch in self._table.to_batches())])
        self._neighbours: Neighbours | None = None
        if facts.nearest and with_codes:
            self._neighbours = Neighbours(folder, vectors)
        room = max(1, min(_CONDITIONS, _CONDITIONS_BYTES // (facts.count // 8 + (1 << 17))))
        self._met = lru_cache(room)(lambda where: evaluate(where, self._columns))
        # The parser and Arrow's functions load what they need at their first use.
        evaluate("path LIKE 'a%' AND path = 'a'", self._columns.slice(0, 1))

    @property
    def schema(self) -> pa.Schema:
        """Of the columns and the thumbnails."""
        return self._table.schema

    def rows(self, columns: Sequence[str], batch: int) -> Iterator[pa.RecordBatch]:
        """Read columns of all images, `vector` among them, in batches of at most so many rows."""
        names = [name for name in columns if name != VECTOR]
        start = 0
        for part in self._table.select(names).to_batches(batch):
            arrays = dict(zip(names, part.columns, strict=True))
            if VECTOR in columns:
                arrays[VECTOR] = vector_column(self.vectors[start : start + len(part)])
            yield pa.record_batch([arrays[name] for name in columns], list(columns))
            start += len(part)

    def find(
        self, embedding: NDArray[np.float32], top_k: int, where: str | None, *, thumbnails: bool
    ) -> list[Hit]:
        """Find the nearest images, best first, equals in the order of their ids."""
        met = None if where is None else self._met(where)
        with self._search_errors():
            positions = self._nearest(embedding, top_k, met)
            # Sums that don't depend on a vector's place, so that equals score the same.
            scores = (self.vectors[positions] * embedding).sum(axis=1)
            ids = self._values("path", positions)
            keys = (-np.nan_to_num(scores, nan=np.inf)).tolist()  # NaN comes first, and is refused
            order = sorted(range(len(ids)), key=lambda row: (keys[row], ids[row]))[:top_k]
            best = positions[order]
            columns = [
                [plain(value) for value in self._values(name, best)] for name in self.facts.columns
            ]
            images = self._values(THUMBNAIL, best) if thumbnails else [None] * len(order)
            return [
                Hit(
                    ids[row],
                    float(scores[row]),
                    dict(zip(self.facts.columns, values, strict=True)),
                    image or b"",
                )
                for row, values, image in zip(
                    order, zip(*columns, strict=True), images, strict=True
                )
            ]

    def embeddings(self, ids: list[str]) -> dict[str, NDArray[np.float32]]:
        """Get the embeddings, float32 [D], of those of these images that the index has."""
        with self._search_errors():
            paths = self._table["path"]
            rows = pc.indices_nonzero(pc.is_in(paths, value_set=text_array(ids)))
            return {paths[row.as_py()].as_py(): np.array(self.vectors[row.as_py()]) for row in rows}

    def _nearest(self, embedding: NDArray[np.float32], top_k: int, met: Met | None) -> Positions:
        """Positions of the nearest images; more than `top_k` where rounding does not tell them from
        the last.
        """
        if self._neighbours is not None:
            effort = self.facts.nearest
            assert effort is not None
            if met is not None and met.count <= FEW:
                rows = met.positions
                return rows[near_best(self._neighbours.cosines(embedding, rows), top_k)]
            count = len(self.vectors) if met is None else met.count
            wanted = min(top_k, count)
            positions, _ = self._neighbours.nearest(
                embedding, wanted, effort.nprobes, effort.candidates, met
            )
            return positions
        if met is None:
            return np.flatnonzero(near_best(self.vectors @ embedding, top_k))
        rows = met.positions
        if len(rows) > len(self.vectors) // 8:  # to copy these takes longer than to compare all
            scores = (self.vectors @ embedding)[rows]
        else:
            scores = self.vectors[rows] @ embedding
        return rows[near_best(scores, top_k)]

    def _values(self, name: str, positions: Positions) -> list[Any]:
        """The values of a column at some positions, as Python has them."""
        chunks = self._table[name].chunks
        which = np.searchsorted(self._starts, positions, side="right") - 1
        rows = positions - self._starts[which]
        return [
            chunks[c][row].as_py() for c, row in zip(which.tolist(), rows.tolist(), strict=True)
        ]

    @contextlib.contextmanager
    def _search_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            print(
                f"the index {self._name} could not be searched: {error}; unless it was replaced"
                " just now, see radapter-index verify",
                file=sys.stderr,
            )
            raise TaskError(
                UNKNOWN_INDEX,
                f"the index {self._name} can't be searched: a file is damaged; the server's log"
                " says why",
            ) from None


def write_table(folder: Path, batches: Iterable[pa.RecordBatch], shape: tuple[int, int]) -> None:
    """Write `rows.arrow` and `vectors.npy`; both may be larger than memory. `shape` is the number
    of images, and D.
    """
    count = 0
    waiting: list[pa.RecordBatch] = []
    writer: pa.RecordBatchFileWriter | None = None
    with (folder / ROWS).open("wb") as rows, (folder / VECTORS).open("wb") as vectors:
        # Not through a mapping: a full disk would end the process.
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(vectors, header)  # type: ignore[no-untyped-call]

        def flush() -> None:
            assert writer is not None
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
            waiting.clear()

        for batch in batches:
            count += len(batch)
            vectors.write(np.ascontiguousarray(vectors_of(batch[VECTOR])).tobytes())
            part = batch.drop_columns([VECTOR])
            place = part.schema.get_field_index(THUMBNAIL)
            large = part.column(place).cast(pa.large_binary())
            part = part.set_column(place, THUMBNAIL, large)
            if writer is None:
                writer = pa.ipc.new_file(rows, part.schema)
            waiting.append(part)
            size = sum(each.nbytes for each in waiting)
            if sum(map(len, waiting)) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                flush()
        if writer is not None:
            if waiting:
                flush()
            writer.close()
    if count != shape[0]:
        raise RAdapterError(f"the table has {count} images and should have {shape[0]}")


def vector_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Vectors [N, D] as a column of Arrow's."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def vectors_of(column: Any) -> NDArray[np.float32]:
    """A column of Arrow's as vectors, float32 [N, D]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(array), -1)


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(item) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
