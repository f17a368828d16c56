"""An index in a folder: its generations, and a pointer to the current one, whose files are mapped
and searched.

`index.json` names the current generation, a folder `g-...` next to it. A generation has an
`index.json` with the facts, `rows.arrow` (the columns and the thumbnails, an Arrow file),
`vectors.npy` (float32 [N, D], unit length) and, for many images, FAISS's codes. Row n is the same
image in all of them. A generation never changes; writing `index.json` replaces the index.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import mmap
import os
import re
import secrets
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from radapter_serve.contract.embeddings import Cache
from radapter_serve.contract.errors import Cancelled, TaskError, check_cancelled
from radapter_serve.contract.images import FifoLimit
from radapter_serve.errors import RAdapterError, cause, reason
from radapter_serve.files import digest_of, map_array, write_text, written_array
from radapter_serve.index.conditions import Met, evaluate, text_array
from radapter_serve.index.facts import FACTS, FileFacts, Hit, Index, IndexFacts, Search
from radapter_serve.index.neighbours import CODES, Neighbours, Positions, near_best

GENERATION = "generation"
# Size in bytes up to which all files of a generation are verified each time it is opened, in a
# second or two. In a larger one only the codes are, which FAISS reads without a check.
CHECKED_AT_OPEN = 1 << 30
ROWS = "rows.arrow"
VECTORS = "vectors.npy"
VECTOR = "vector"  # the column that `vectors.npy` holds
THUMBNAIL = "thumbnail"
# Images up to which a search compares every vector, which takes about 0.05 s and asks for no
# `cancelled`; above, FAISS finds candidates.
EXACT = 20_000
# Images that meet a condition, and their fraction of all, up to which a search compares each; above
# both, FAISS finds candidates.
FEW = 4_096
FEW_OF_ALL = 1 / 64
_CHUNK_ROWS = 1 << 16  # rows of a record batch; a few large ones are compared fastest
_CHUNK_BYTES = 256 << 20  # size of a record batch at which it is written
_CONDITIONS_BYTES = 32 << 20  # of the conditions whose rows are cached
_CONDITION_BYTES = 1 << 19  # of one, besides the bits of its rows
# Conditions evaluated at once in this process, and those that wait, so that other requests have
# threads; one whose rows are cached does not wait.
CONDITION_TURNS = FifoLimit(2, 16, "requests with a new condition")


def read_pointer(folder: Path) -> tuple[str, IndexFacts]:
    """Read the pointer of a folder: the name of its current generation, and the facts."""
    path = folder / FACTS
    command = f"--out {shlex.quote(str(folder))}"
    source = "SOURCE"
    try:
        generation = json.loads(path.read_bytes())[GENERATION]
        if not is_generation(generation):
            raise ValueError(f"it names the generation {generation!r:.40}")
        path = folder / generation / FACTS
        facts = path.read_bytes()
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            source = shlex.quote(str(json.loads(facts)["plan"]["source"]))
        return generation, IndexFacts.from_json(facts)
    except (FileNotFoundError, NotADirectoryError):
        raise RAdapterError(
            f"no index at {folder}; make one: radapter-index build PHOTOS {command}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RAdapterError(
            f"{path} can't be read ({reason(error)}); build it again: radapter-index build"
            f" {source} {command}"
        ) from None


def pointed(folder: Path, key: str) -> str:
    """A value of the pointer of a folder; "" if it has none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads((folder / FACTS).read_bytes())[key])
    return ""


def is_generation(name: Any) -> bool:
    """True if a name has the form of a generation's name."""
    return isinstance(name, str) and re.fullmatch("g-[0-9a-f]{16}", name) is not None


def generations_of(folder: Path) -> list[Path]:
    """List the generations in a folder, current or not."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if is_generation(path.name)]


def describe_files(folder: Path) -> dict[str, FileFacts]:
    """List the files of a finished folder, with their sizes and digests."""
    return {
        path.name: FileFacts(path.stat().st_size, digest_of(path))
        for path in sorted(folder.iterdir())
    }


def install(new: Path, folder: Path, facts: IndexFacts, keep: datetime.timedelta) -> None:
    """Make a finished folder the current generation, atomically; the one before stays a while."""
    generation = f"g-{secrets.token_hex(8)}"
    write_text(new / FACTS, facts.to_json())
    folder.mkdir(exist_ok=True)
    before = pointed(folder, GENERATION)
    new.rename(folder / generation)
    write_text(folder / FACTS, json.dumps({GENERATION: generation}))
    if is_generation(before):
        with contextlib.suppress(OSError):
            os.utime(folder / before)
    # Remove what a killed command left, and generations that were replaced long ago.
    for left in folder.glob(".*.new"):
        left.unlink(missing_ok=True)
    for place in generations_of(folder):
        with contextlib.suppress(OSError):
            replaced = datetime.datetime.fromtimestamp(place.stat().st_mtime)
            if place.name != generation and datetime.datetime.now() - replaced > keep:
                shutil.rmtree(place)


def map_vectors(path: Path, rows: Path, ids: pa.ChunkedArray, *, unique: bool) -> NDArray[Any]:
    """Map a user's vectors, floats [N, D], from a `.npy` file for a table of rows with these ids,
    of which each is of one row if `unique`.
    """
    allowed = (
        'allowed: a .npy file of floats [N, D], as numpy.save(FILE, vectors.astype("float32"))'
        " writes it"
    )
    try:
        vectors = map_array(path)
    except (OSError, ValueError) as error:
        why = cause(error)
        if "Python objects" in why:
            why = "it holds Python objects, which could run code and are never unpickled"
        raise RAdapterError(f"could not read the vectors {path}: {why:.200}; {allowed}") from None
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        shape = list(vectors.shape)
        raise RAdapterError(f"the vectors of {path} are {vectors.dtype} {shape}; {allowed}")
    if len(ids) != len(vectors):
        raise RAdapterError(
            f"{rows} has {len(ids):,} rows, and {path} {len(vectors):,} vectors; allowed: a row for"
            " each vector, in their order; name the table that was written with them with --rows"
        )
    if unique and len(ids.unique()) != len(ids):
        twice, _ = Counter(ids.to_pylist()).most_common(1)[0]
        raise RAdapterError(
            f"{rows} names {twice!r:.200} twice; an id is of one row, so number them apart, or name"
            " a column of ids with --image-column"
        )
    return vectors


def unit_vectors(
    vectors: NDArray[Any], source: str | Path, numbers: Sequence[int]
) -> NDArray[np.float32]:
    """Scale a user's vectors [N, D] to unit length; the error about one that is zero or not finite
    names its number in their source.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if len(bad):
        raise RAdapterError(
            f"{source}, row {numbers[bad[0]]}: the vector has no direction, as its length is"
            f" {lengths[bad[0], 0]:g}; allowed: finite numbers that are not all 0; embed this image"
            " again, or take its row out of the vectors and of their table"
        )
    return np.asarray(vectors / lengths, np.float32)


class FolderIndex(Index):
    """An index whose files are mapped from a folder's current generation. `complete` verifies all
    files with their digests; `codes` False ignores FAISS's codes.
    """

    def __init__(self, folder: Path, *, complete: bool = False, codes: bool = True) -> None:
        super().__init__(folder, *read_pointer(folder))
        try:
            self._open(complete, codes)
        except RAdapterError as error:
            raise RAdapterError(
                f"the index {folder} can't be used: {error}; build it again:"
                f" {self.facts.plan.command(folder)}"
            ) from None
        self._met = Cache(_CONDITIONS_BYTES)
        # The first condition makes the parser and Arrow import their modules.
        evaluate("path LIKE 'a%' AND path = 'a'", self._columns.slice(0, 1))

    def _open(self, complete: bool, codes: bool) -> None:
        """Compare the files with the sizes and digests in the facts, and map them."""
        folder = self.folder / self.generation
        files = {name: known for name, known in self.facts.files.items() if codes or name != CODES}
        every = complete or sum(known.size for known in files.values()) <= CHECKED_AT_OPEN
        with ThreadPoolExecutor(len(files) or 1) as pool:
            whole = pool.map(lambda name: self.is_whole(name, every or name == CODES), files)
        damaged = [name for name, is_whole in zip(files, whole, strict=True) if not is_whole]
        if damaged:
            raise RAdapterError(
                f"{', '.join(damaged)} in {self.generation} is not as it was written"
            )
        try:
            with (folder / ROWS).open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._table = pa.ipc.open_file(pa.py_buffer(mapping)).read_all()
            self._table.validate(full=True)
            vectors = map_array(folder / VECTORS)
            self._columns = self._table.select(self.facts.columns)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise RAdapterError(f"{folder} can't be read: {reason(error):.300}") from None
        shape = (len(self), self.facts.plan.release.embed_dim)
        fits = vectors.shape == shape and vectors.dtype == np.float32
        if not fits or len(self._table) != shape[0]:
            raise RAdapterError(
                f"{folder} does not hold the {shape[0]} images of width {shape[1]} that index.json"
                " names"
            )
        self.vectors: NDArray[np.float32] = vectors  # [N, D], mapped
        self._neighbours = Neighbours(folder, vectors) if codes and self.facts.nearest else None

    def is_whole(self, name: str, complete: bool = True) -> bool:
        """True if a file has the size in the facts, and, if it is read completely, the digest."""
        path = self.folder / self.generation / name
        known = self.facts.files[name]
        with contextlib.suppress(OSError):
            same = path.stat().st_size == known.size
            return same and (not complete or digest_of(path) == known.digest)
        return False

    @property
    def schema(self) -> pa.Schema:
        """Schema of the columns and the thumbnails."""
        return self._table.schema

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all images, mapped."""
        return self._table.select(list(columns))

    def rows(self, columns: Sequence[str], batch: int) -> Iterator[pa.RecordBatch]:
        """Read columns of all images, also `vector`, in batches of at most `batch` rows."""
        names = [name for name in columns if name != VECTOR]
        start = 0
        for part in self._table.select(names).to_batches(batch):
            arrays = dict(zip(names, part.columns, strict=True))
            if VECTOR in columns:
                arrays[VECTOR] = vector_column(self.vectors[start : start + len(part)])
            yield pa.record_batch([arrays[name] for name in columns], list(columns))
            start += len(part)

    def _find(self, search: Search) -> list[Hit]:
        where = search.where
        # Evaluate the condition, or take its rows from the cache.
        met: Met | None = None if where is None else self._met.get(where)
        if where is not None and met is None:
            with CONDITION_TURNS(search.cancelled):
                met = self._met.get(where) or evaluate(where, self._columns, search.cancelled)
            self._met.put(where, met, met.bits.nbytes + _CONDITION_BYTES)

        with self._search_errors():
            positions = self._nearest(search, met)
            # This sum does not depend on the vector's position, so equal vectors score the same.
            scores = (self.vectors[positions] * search.embedding).sum(axis=1)
            paths = self._table["path"]
            ids = [paths[position].as_py() for position in positions.tolist()]
            keys = (-np.nan_to_num(scores, nan=np.inf)).tolist()  # NaN first, as it raises an error
            order = sorted(range(len(ids)), key=lambda row: (keys[row], ids[row]))[: search.top_k]

            columns = {name: self._table[name] for name in self.facts.columns}
            images = self._table[THUMBNAIL]
            hits = []
            for row in order:
                at = int(positions[row])
                metadata = {name: plain(column[at].as_py()) for name, column in columns.items()}
                image = images[at].as_py() if search.thumbnails else None
                hits.append(Hit(ids[row], float(scores[row]), metadata, image or b""))
            return hits

    def _embeddings(
        self, ids: list[str], cancelled: Cancelled | None
    ) -> dict[str, NDArray[np.float32]]:
        wanted = text_array(ids)
        vectors = {}
        start = 0
        with self._search_errors():
            for paths in self._table["path"].chunks:
                check_cancelled(cancelled)
                for row in pc.indices_nonzero(pc.is_in(paths, value_set=wanted)).to_pylist():
                    vectors[paths[row].as_py()] = np.array(self.vectors[start + row])
                start += len(paths)
        return vectors

    def _nearest(self, search: Search, met: Met | None) -> Positions:
        """Find the nearest images that meet the condition; more than `top_k` if rounding could
        change the last.
        """
        embedding = search.embedding
        top_k = search.top_k
        effort = self.facts.nearest
        if self._neighbours is not None and effort is not None:
            if met is not None and met.count <= max(FEW, FEW_OF_ALL * len(self)):
                rows = met.positions
                return rows[near_best(self._neighbours.cosines(embedding, rows), top_k)]
            wanted = min(top_k, len(self) if met is None else met.count)
            positions, _ = self._neighbours.nearest(
                embedding, wanted, effort.nprobes, effort.candidates, met, search.cancelled
            )
            return positions
        if met is None:
            return np.flatnonzero(near_best(self.vectors @ embedding, top_k))
        rows = met.positions
        if len(rows) > len(self) // 8:  # copying the rows would take longer than comparing all
            scores = (self.vectors @ embedding)[rows]
        else:
            scores = self.vectors[rows] @ embedding
        return rows[near_best(scores, top_k)]

    @contextlib.contextmanager
    def _search_errors(self) -> Iterator[None]:
        try:
            yield
        except TaskError:
            raise
        except Exception as error:
            why = f"could not be searched: {error}; unless it was replaced just now"
            raise self._damaged(why) from None


def write_table(folder: Path, batches: Iterable[pa.RecordBatch], shape: tuple[int, int]) -> None:
    """Write `rows.arrow` and `vectors.npy` of `shape` [N, D], which may be larger than memory."""
    count = 0
    waiting: list[pa.RecordBatch] = []
    writer: pa.RecordBatchFileWriter | None = None
    with (folder / ROWS).open("wb") as rows, written_array(folder / VECTORS, shape) as put:

        def flush() -> None:
            assert writer is not None
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
            waiting.clear()

        for batch in batches:
            count += len(batch)
            put(vectors_of(batch[VECTOR]))
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
    """Convert vectors [N, D] to an Arrow column."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def vectors_of(column: Any) -> NDArray[np.float32]:
    """Convert an Arrow column to vectors, float32 [N, D]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(array), -1)


def plain(value: Any) -> Any:
    """Convert a value to a JSON value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(item) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
