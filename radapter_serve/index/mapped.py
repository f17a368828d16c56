"""The files that a search reads: every row and every vector of an index, mapped from the disk.

They lie in the folder `search` of a generation, next to the table that is written to: `rows.arrow`
(the columns and the thumbnails, an Arrow file), `vectors.npy` (float32) and, of many images, the
codes by which FAISS finds the nearest. An image has the same position in each.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import digest_of
from radapter_serve.index.arrays import npy_file
from radapter_serve.index.facts import FileFacts
from radapter_serve.index.store import THUMBNAIL, vectors_of

FOLDER = "search"
ROWS = "rows.arrow"
VECTORS = "vectors.npy"
VECTOR = "vector"  # the column that `vectors.npy` holds
_CHUNK_ROWS = 1 << 16  # of a record batch: few and large ones are compared fastest
_CHUNK_BYTES = 256 << 20  # that a record batch reaches at most, but for its last part

Positions = NDArray[np.int64]


class Mapped:
    """The rows and vectors of a generation.

    Args:
        folder: of the files.
        shape: number of images, and D.

    Raises:
        RAdapterError: a file is missing, or does not hold that.

    Attributes:
        vectors: float32 [N, D], mapped.
    """

    def __init__(self, folder: Path, shape: tuple[int, int]) -> None:
        try:
            with (folder / ROWS).open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._table = pa.ipc.open_file(pa.py_buffer(mapping)).read_all()
            self._table.validate(full=True)
            # numpy's class for mapped files makes each slice slow.
            vectors = np.asarray(np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RAdapterError(f"{folder} can't be read: {reason(error):.300}") from None
        fits = vectors.shape == shape and vectors.dtype == np.float32
        if not fits or len(self._table) != shape[0]:
            raise RAdapterError(
                f"{folder} does not hold the {shape[0]} images of width {shape[1]} that index.json"
                " names"
            )
        self.vectors: NDArray[np.float32] = vectors
        self._chunks = {name: column.chunks for name, column in self.columns.items()}
        sizes = [len(batch) for batch in self._table.to_batches()]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self._table)

    @property
    def columns(self) -> Mapping[str, Any]:
        """Each column but the vectors, as Arrow's chunked array."""
        return dict(zip(self._table.column_names, self._table.columns, strict=True))

    def values(self, names: Sequence[str], positions: Positions) -> dict[str, list[Any]]:
        """The values of some columns at some positions, as Python has them."""
        which = np.searchsorted(self._starts, positions, side="right") - 1
        rows = (positions - self._starts[which]).tolist()
        places = list(zip(which.tolist(), rows, strict=True))
        found = {}
        for name in names:
            chunks = self._chunks[name]
            found[name] = [chunks[chunk][row].as_py() for chunk, row in places]
        return found

    def batches(self, columns: Sequence[str], batch: int) -> Iterator[pa.RecordBatch]:
        """Columns of all images, `vector` among them, in batches of at most so many rows."""
        names = [name for name in columns if name != VECTOR]
        start = 0
        for part in self._table.to_batches(batch):
            arrays = {name: part.column(name) for name in names}
            if VECTOR in columns:
                vectors = np.array(self.vectors[start : start + len(part)])
                flat = pa.array(vectors.ravel())
                arrays[VECTOR] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            yield pa.record_batch([arrays[name] for name in columns], list(columns))
            start += len(part)


def write_mapped(
    folder: Path,
    batches: Iterable[pa.RecordBatch],
    shape: tuple[int, int],
    chunk_rows: int = _CHUNK_ROWS,
) -> None:
    """Write `rows.arrow` and `vectors.npy`.

    Args:
        folder: that is there.
        batches: all columns of the images.
        shape: number of images, and D.
        chunk_rows: that a record batch of `rows.arrow` reaches, but for the last; large thumbnails
            make it shorter.

    Raises:
        RAdapterError: there are more or fewer images.
        OSError: the disk refuses.
    """
    count = 0
    waiting: list[pa.RecordBatch] = []
    rows: pa.RecordBatchFileWriter | None = None
    with npy_file(folder / VECTORS, "<f4", shape) as write, (folder / ROWS).open("wb") as file:
        for batch in batches:
            count += len(batch)
            write(vectors_of(batch.column(VECTOR)))
            part = _stored(batch)
            if rows is None:
                rows = pa.ipc.new_file(file, part.schema)
            waiting.append(part)
            if _is_large(waiting, chunk_rows):
                rows.write_table(pa.Table.from_batches(waiting).combine_chunks())
                waiting = []
        if rows is not None:
            if waiting:
                rows.write_table(pa.Table.from_batches(waiting).combine_chunks())
            rows.close()
    if count != shape[0]:
        raise RAdapterError(f"the table has {count} images and should have {shape[0]}")


def described(folder: Path) -> dict[str, FileFacts]:
    """The size and digest of each file of a folder, by name."""
    return {
        path.name: FileFacts(path.stat().st_size, digest_of(path))
        for path in sorted(folder.iterdir())
    }


def _stored(batch: pa.RecordBatch) -> pa.RecordBatch:
    """What `rows.arrow` has of a batch: all but the vectors."""
    part = batch.drop_columns([VECTOR])
    place = part.schema.get_field_index(THUMBNAIL)
    large = part.column(place).cast(pa.large_binary())
    return part.set_column(place, THUMBNAIL, large)


def _is_large(batches: Sequence[pa.RecordBatch], chunk_rows: int) -> bool:
    rows = sum(map(len, batches))
    return rows >= chunk_rows or sum(batch.nbytes for batch in batches) >= _CHUNK_BYTES
