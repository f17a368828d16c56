"""The embeddings of an index as plain files, in the layout of clip-retrieval: NumPy arrays, and
Parquet next to them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.index.arrays import npy_file
from radapter_serve.index.index import Index, open_index
from radapter_serve.index.store import vectors_of
from radapter_serve.index.store.local import table_errors
from radapter_serve.index.stored import file_of
from radapter_serve.index.writer import BATCH, Progress

PART = 1_000_000  # images in one file, as clip-retrieval has it
_PATH = "image_path"  # what clip-retrieval calls an image's file

Rows = Iterator[tuple[NDArray[np.float32], pa.Table]]  # embeddings and metadata


def export_embeddings(
    index: Path,
    out: Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    progress: Progress | None = None,
    part: int = PART,
    batch: int = BATCH,
) -> int:
    """Write `img_emb/img_emb_0.npy` and `metadata/metadata_0.parquet`, and so on for each million
    images.

    Row n of an array is row n of the table next to it. The files appear all or not at all.

    Args:
        index: the index's folder.
        out: folder to write, which must not hold anything.
        dtype: of the arrays [N, D], whose rows have unit length; clip-retrieval itself writes
            float16.
        progress: called after every batch.
        part: images in one file.
        batch: images that are read at once.

    Returns:
        How many images there are.

    Raises:
        RAdapterError: there is no index, `out` holds something, or the disk is full.
    """
    source = open_index(index)
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RAdapterError(
            f"{out} holds something; give another folder with --to, or move that away"
        )
    if _PATH in source.facts.columns:
        raise RAdapterError(
            f"the index {index} has a column {_PATH}, which clip-retrieval would take for the"
            " files; build it again with another name for that column"
        )
    staged = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = _rows(source, part, batch)
        _write(rows, len(source), staged, np.dtype(dtype), part, progress)
        staged.replace(out)  # over an empty folder, too
    except OSError as error:
        raise RAdapterError(
            f"could not write {shlex.quote(str(out))}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return len(source)


def _write(
    rows: Rows,
    count: int,
    staged: Path,
    dtype: np.dtype[Any],
    part: int,
    progress: Progress | None,
) -> None:
    for name in ("img_emb", "metadata"):
        (staged / name).mkdir(parents=True)
    # Readers take the files in the order of their names.
    digits = len(str(max(count - 1, 0) // part))
    for number, start in enumerate(range(0, count, part)):
        name = str(number).zfill(digits)
        length = min(part, count - start)
        written = 0
        with contextlib.ExitStack() as held:
            while written < length:
                vectors, metadata = next(rows)  # opening has compared their number with `count`
                if not written:
                    shape = (length, vectors.shape[1])
                    write = held.enter_context(
                        npy_file(staged / "img_emb" / f"img_emb_{name}.npy", dtype, shape)
                    )
                    path = staged / "metadata" / f"metadata_{name}.parquet"
                    table = held.enter_context(pq.ParquetWriter(path, metadata.schema))
                write(vectors)
                table.write_table(metadata)
                written += len(vectors)
                if progress is not None:
                    progress(start + written, count)


def _rows(source: Index, part: int, batch: int) -> Rows:
    """Embeddings and metadata, in batches that never reach over the end of a part."""
    done = 0
    root = Path(source.facts.plan.root)
    with table_errors(source.folder, source.facts.plan):
        for read in source.rows([*source.facts.columns, "vector"], batch):
            table = pa.Table.from_batches([read])
            while len(table):
                some = table.slice(0, part - done % part)
                yield vectors_of(some["vector"]), _with_files(some.drop_columns(["vector"]), root)
                table = table.slice(len(some))
                done += len(some)


def _with_files(metadata: pa.Table, root: Path) -> pa.Table:
    """The metadata with the images' files in front."""
    files = pa.array(
        [str(file_of(path, root)) for path in metadata["path"].to_pylist()], pa.string()
    )
    return metadata.add_column(0, _PATH, files)
