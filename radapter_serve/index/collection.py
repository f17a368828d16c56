"""The image files of an index, from a folder or from a table with metadata, and their reading: on
this machine, or by the workers of a Ray cluster.

Every worker needs this package, and must see the files and the model repository at the same paths
as this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import MAX_BYTES, oriented, require_images, without_heic
from radapter_serve.encoders.loaded import LoadedRelease, release_at
from radapter_serve.errors import RAdapterError, cause, check_installed, reason
from radapter_serve.files import digest_of, open_regular, open_table
from radapter_serve.process import THREADS
from radapter_serve.release.release import Release

# The columns of every index; a table may not have columns of these names.
COLUMNS = ("path", "width", "height", "digest", "thumbnail", "vector")
_SIGNS = set('.`"\\')  # not allowed in a column's name by conditions or by Qdrant
Progress = Callable[[int, int], None]  # arguments: images done, and their total number
MAX_COLUMNS = 1000
# Most bytes that a table's file may unfold to: `_UNFOLDED` times its size, and always `_SMALL`.
_UNFOLDED = 1000
_SMALL = 64 << 20
_ROWS = 4096  # most rows of a table read at once
_AHEAD = 2  # batches that each worker has: one in work, one waiting


@dataclass(frozen=True)
class Item:
    """An image file."""

    id: str  # path relative to the index's root, or the whole path if it is outside the root
    file: Path
    row: dict[str, Any] = field(default_factory=dict)  # row of the table; empty for a folder


@dataclass(frozen=True)
class Collection:
    """The image files of a source."""

    source: str  # with an absolute path
    root: Path  # folder that ids are relative to
    items: list[Item]  # folder by folder, or in the order of the table
    columns: dict[str, Any]  # Arrow types of the table's other columns
    repeated: int = 0  # rows left out, as an earlier row names the same image
    left_out: dict[str, int] = field(default_factory=dict)  # files of other kinds, by suffix


def open_collection(
    source: str, *, image_column: str = "image", root: Path | None = None
) -> Collection:
    """Find the images of a folder, `csv:FILE` or `parquet:FILE`; ids are relative to `root`."""
    kind, colon, place = source.partition(":")
    is_table = colon == ":" and kind in ("csv", "parquet")
    # Remove "..", but keep symbolic links.
    path = Path(os.path.abspath(place if is_table else source))  # noqa: PTH100
    if not is_table:
        files = require_images(path, "a folder of images, csv:FILE or parquet:FILE")
        root = root or path
        items = [Item(_id(file, root), file) for file in files.images]
        return Collection(str(path), root, items, {}, left_out=files.left_out)

    root = root or path.parent
    table = read_rows(path, image_column, kind)
    columns = {column.name: column.type for column in table.schema if column.name != image_column}
    names = table[image_column].to_pylist()
    rows = table.drop_columns([image_column]).to_pylist() if columns else [{}] * len(names)
    by_id: dict[str, Item] = {}
    for name, row in zip(names, rows, strict=True):
        file = Path(os.path.normpath(path.parent / name))
        item = Item(_id(file, root), file, row)
        by_id.setdefault(item.id, item)
    items = list(by_id.values())
    return Collection(f"{kind}:{path}", root, items, columns, len(names) - len(items))


def _id(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def read_rows(path: Path, image_column: str, kind: str | None = None) -> Any:
    """Read a table of images as an Arrow table, with NaN as NULL; `kind` is "csv" or "parquet"."""
    import pyarrow
    from pyarrow import compute, csv, types

    kind = kind or ("csv" if path.suffix == ".csv" else "parquet")
    try:
        with open_table(path) as file:
            table = csv.read_csv(file) if kind == "csv" else _read_parquet(path, file)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {cause(error)}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise RAdapterError(
            f"{path} is not {kind.upper()} that can be read: {reason(error)}"
        ) from None
    _check_columns(path, table.num_columns)
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    if repeated:
        raise RAdapterError(f"{path} has the column {min(repeated)!r} twice; rename one")
    if image_column not in table.column_names:
        raise RAdapterError(
            f"{path} has no column {image_column!r}; its columns: {', '.join(table.column_names)};"
            " see --image-column"
        )

    for number, column in enumerate(table.schema):
        name = column.name
        if types.is_null(column.type):  # a column without any value gets the type text
            table = table.set_column(number, name, table[name].cast(pyarrow.string()))
        if types.is_floating(column.type):
            values = table[name]
            missing = compute.if_else(compute.is_nan(values), None, values)
            table = table.set_column(number, name, missing)
        if name == image_column:
            continue
        if name.lower() in COLUMNS or not name or name[0] == "_" or not _SIGNS.isdisjoint(name):
            raise RAdapterError(
                f"{path} has a column {name!r}; the index needs {', '.join(COLUMNS)} itself, and a"
                f" name has none of {' '.join(sorted(_SIGNS))} and no _ at its start; rename the"
                " column"
            )
        binary = types.is_binary(column.type) or types.is_large_binary(column.type)
        if binary or types.is_struct(column.type):
            raise RAdapterError(
                f"the column {name!r} of {path} is {column.type}; an index keeps text, numbers, yes"
                " or no, dates, and lists"
            )

    if not len(table):
        raise RAdapterError(f"{path} has no row, so there is nothing to index")
    for number, name in enumerate(table[image_column].to_pylist(), 1):
        if not isinstance(name, str) or not name:
            raise RAdapterError(
                f"{path}, row {number}: {image_column!r} is not a path of an image ({name!r:.60})"
            )
    return table


def _read_parquet(path: Path, opened: BinaryIO) -> Any:
    """Read a Parquet file in batches, of which none is large, as a small file may unfold to any
    size.
    """
    import pyarrow
    from pyarrow import parquet

    size = path.stat().st_size
    most = max(_SMALL, _UNFOLDED * size)
    file = parquet.ParquetFile(opened)
    facts = file.metadata
    _check_columns(path, facts.num_columns)
    parts = [facts.row_group(number) for number in range(facts.num_row_groups)]
    # A value takes at least a bit, and at most all of its row group.
    least = facts.num_rows * facts.num_columns // 8
    widest = max((part.total_byte_size for part in parts), default=1)
    batches = []
    total = 0
    if least <= most:
        for batch in file.iter_batches(min(max(most // max(widest, 1), 1), _ROWS)):
            for column in batch.columns:
                if pyarrow.types.is_dictionary(column.type):  # each row is a whole value later
                    column = column.dictionary_decode()
                total += column.nbytes
            if total > most:
                break
            batches.append(batch)
    if max(least, total) > most:
        raise RAdapterError(
            f"{path} has {size:,} bytes and unfolds to more than {most >> 20:,} MiB"
            f" ({facts.num_rows:,} rows, {facts.num_columns} columns); write the table again, with"
            " fewer repeated values"
        )
    return pyarrow.Table.from_batches(batches, file.schema_arrow).combine_chunks()


def _check_columns(path: Path, count: int) -> None:
    if count > MAX_COLUMNS:
        raise RAdapterError(f"{path} has {count:,} columns; at most {MAX_COLUMNS:,} are allowed")


@dataclass(frozen=True)
class Read:
    """The result of reading a file: an error, unchanged bytes, or an image to index."""

    digest: str = ""
    prepared: Any = None  # pixels for the encoder, uint8 [S, S, 3]
    details: Mapping[str, Any] = field(default_factory=dict)  # width, height and thumbnail
    kept: bool = False  # True if the index has the same bytes
    error: str = ""  # reason why the file cannot be indexed
    vector: NDArray[np.float32] | None = None  # the embedding, if a worker computed it


def read(id: str, file: Path, before: str, loaded: LoadedRelease, thumbnails: int) -> Read:
    """Read a file; unless its digest is `before`, prepare it for the encoder, with a thumbnail."""
    turned = loaded.preprocess.exif_orientation
    try:
        id.encode()
        with open_regular(file) as opened:
            data = opened.read(MAX_BYTES + 1)
        digest = digest_of(data)
        if before == digest:
            return Read(digest, kept=True)
        data = without_heic(data)
        pixels = loaded.pixels(data)
    except UnicodeEncodeError:
        return Read(error="its name is not UTF-8")
    except OSError as error:
        return Read(error=error.strerror or str(error))
    except TaskError as error:
        return Read(error=error.what)

    # Width and height as the model saw the image. Decoding succeeded above; if this fails, the
    # index has no details of the image.
    details: dict[str, Any] = {}
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        sideways = turned and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        details["width"], details["height"] = image.size[::-1] if sideways else image.size
        if thumbnails:
            image.draft("RGB", (thumbnails, thumbnails))
            small = oriented(image).convert("RGB")
            small.thumbnail((thumbnails, thumbnails))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=80)
            details["thumbnail"] = out.getvalue()
    return Read(digest, pixels, details)


class Cluster:
    """A Ray cluster, at an address or `auto`, whose workers embed with a release."""

    def __init__(self, address: str, loaded: LoadedRelease) -> None:
        self._loaded = loaded
        check_installed("ray", "ray")
        import ray

        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise RAdapterError(
                f"no Ray cluster at {address}: {reason(error):.200}; start one with: ray start"
                " --head"
            ) from None
        self._gpus = int(resources.get("GPU", 0))
        self._workers = max(1, self._gpus or int(resources.get("CPU", 1)) - 1)  # one core writes

    def read(
        self, items: Sequence[tuple[str, Path, str]], size: int, thumbnails: int
    ) -> Iterator[list[Read]]:
        """Read and embed files in order, in batches of `size`. An item is the id, the file, and the
        digest of the bytes in the index.
        """
        import ray
        from ray.util import ActorPool

        loaded = self._loaded
        make: Any = ray.remote(
            num_cpus=0 if self._gpus else 1,
            num_gpus=1 if self._gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,
        )(_Worker)
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        turned = loaded.preprocess.exif_orientation
        workers = [
            make.remote(loaded.origin, loaded.release, thumbnails, turned)
            for _ in range(min(self._workers, len(batches)))
        ]
        try:
            pool = ActorPool(workers * _AHEAD)
            yield from pool.map(lambda worker, batch: worker.read.remote(batch), batches)
        except ray.exceptions.RayError as error:
            # Keep the last line of the worker's error, without Ray's traceback.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            last = lines[-1] if lines else type(error).__name__
            why = last.rpartition("RAdapterError: ")[2][:300]
            raise RAdapterError(f"the cluster can't embed: {why}") from None
        finally:
            for worker in workers:
                ray.kill(worker)


class _Worker:
    """A worker, which holds a release, and reads and embeds batches."""

    def __init__(
        self,
        origin: Mapping[str, str],
        release: Release,
        thumbnails: int,
        exif_orientation: bool,
    ) -> None:
        os.environ.setdefault(THREADS, "1")  # a worker has one core
        loaded = release_at(origin, None, release.precision)
        if release.dynamic_alpha:
            loaded = loaded.at(release.alpha)
        if loaded.release.image_digest != release.image_digest:
            raise RAdapterError(
                f"a worker found another release at {' '.join(origin.values())} than this"
                " machine has"
            )
        self._loaded = loaded.turned(exif_orientation)
        self._thumbnails = thumbnails

    def read(self, items: Sequence[tuple[str, Path, str]]) -> list[Read]:
        """Read files, and embed those with bytes that the index does not have."""
        images = [read(*item, self._loaded, self._thumbnails) for item in items]
        fresh = {
            image.digest: image.prepared for image in images if not (image.error or image.kept)
        }
        embeds = {}
        if fresh:
            vectors = self._loaded.embed_pixels(list(fresh.values()))
            embeds = dict(zip(fresh, vectors, strict=True))
        return [
            dataclasses.replace(image, prepared=None, vector=embeds.get(image.digest))
            for image in images
        ]
