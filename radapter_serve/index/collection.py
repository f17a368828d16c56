"""The image files that an index is made of, those of a folder or those that a table names with
their metadata, and how one is read, on this machine or on a worker of a cluster.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import SUFFIXES, count_kinds, list_images, oriented
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import digest_of

# The columns of every index; a table's own may not have these names.
COLUMNS = ("path", "width", "height", "digest", "thumbnail", "vector")
Progress = Callable[[int, int], None]  # images done, of how many


@dataclass(frozen=True)
class Item:
    """An image file."""

    id: str  # its path from the index's root, or its whole path if it lies elsewhere
    file: Path
    row: dict[str, Any] = field(default_factory=dict)  # of the table; empty for a folder


@dataclass(frozen=True)
class Collection:
    """The image files of a source."""

    source: str  # as it can be opened from anywhere
    root: Path  # folder that ids start from
    items: list[Item]  # folder by folder, or in the order of the table
    columns: dict[str, Any]  # Arrow types of the table's other columns
    repeated: int = 0  # rows left out, because an earlier one names the same image
    left_out: dict[str, int] = field(default_factory=dict)  # files of other kinds, by suffix


def open_collection(
    source: str, *, image_column: str = "image", root: Path | None = None
) -> Collection:
    """Find the images of a source: a folder, read with all folders in it (`folder:DIR` if its name
    has a colon), `csv:FILE` or `parquet:FILE`. Ids start from `root`, or from the source's folder.
    """
    kind, colon, place = source.partition(":")
    if not colon or kind not in ("folder", "csv", "parquet"):
        kind = "folder"
        place = source
    path = Path(os.path.abspath(place))  # noqa: PTH100  # without "..", symbolic links as they are
    if kind == "folder":
        if not path.is_dir():
            raise RAdapterError(
                f"{source} is no folder; give a folder of images, csv:FILE or parquet:FILE"
            )
        root = root or path
        files = list_images(path)
        items = [Item(_id(file, root), file) for file in files.images]
        if not items:
            has = f"; it has {count_kinds(files.left_out)}" if files.left_out else ""
            raise RAdapterError(
                f"{source} holds no image; allowed are {', '.join(SUFFIXES)}, in any folder of"
                f" it{has}"
            )
        source = f"folder:{path}" if ":" in str(path) else str(path)
        return Collection(source, root, items, {}, left_out=files.left_out)

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
    """Read a table of images as an Arrow table, with NaN as NULL; `kind` is "csv" or "parquet", by
    the end of the file's name if None.
    """
    import pyarrow
    from pyarrow import compute, csv, parquet, types

    kind = kind or ("csv" if path.suffix == ".csv" else "parquet")
    try:
        table = csv.read_csv(path) if kind == "csv" else parquet.read_table(path)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror or reason(error)}") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise RAdapterError(
            f"{path} is not {kind.upper()} that can be read: {reason(error)}"
        ) from None
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
        if types.is_null(column.type):  # a column without a value; text is as good as any
            table = table.set_column(number, name, table[name].cast(pyarrow.string()))
        if types.is_floating(column.type):
            values = table[name]
            missing = compute.if_else(compute.is_nan(values), None, values)
            table = table.set_column(number, name, missing)
        if name == image_column:
            continue
        if name.lower() in COLUMNS or not name or name[0] == "_" or "." in name or "`" in name:
            raise RAdapterError(
                f"{path} has a column {name!r}; the index needs {', '.join(COLUMNS)} itself, and a"
                " name has no . or ` in it and no _ at its start; rename the column"
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
                f"{path}, row {number}: {image_column!r} is no path of an image ({name!r:.60})"
            )
    return table


@dataclass(frozen=True)
class Read:
    """A file that was read: it is in the index already, or is prepared for the encoder or embedded,
    or is broken.
    """

    digest: str = ""
    prepared: Any = None  # pixels for the encoder, uint8 [S, S, 3]
    details: Mapping[str, Any] = field(default_factory=dict)  # width, height and thumbnail
    kept: bool = False  # whether the index has the same bytes
    error: str = ""  # why it can't be indexed
    vector: NDArray[np.float32] | None = None  # its embedding if it is known


def read(id: str, file: Path, before: str, loaded: LoadedRelease, thumbnails: int) -> Read:
    """Read a file, and prepare it if the digest of its bytes is not the one from before.
    Thread-safe.
    """
    try:
        id.encode()
        data = file.read_bytes()
        digest = digest_of(data)
        if before == digest:
            return Read(digest, kept=True)
        turned = loaded.preprocess.exif_orientation
        return Read(digest, loaded.pixels(data), describe_image(data, thumbnails, turned))
    except UnicodeEncodeError:
        return Read(error="its name is not UTF-8")
    except OSError as error:
        return Read(error=error.strerror or str(error))
    except TaskError as error:
        return Read(error=error.what)


def describe_image(data: bytes, size: int, turned: bool) -> dict[str, Any]:
    """Width and height of an image file as it was embedded, `turned` by its EXIF orientation or
    not, and an upright thumbnail of `size` px.
    """
    details: dict[str, Any] = {}
    # The file was decoded before; if this fails, an index does without.
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        sideways = turned and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        details["width"], details["height"] = image.size[::-1] if sideways else image.size
        if size:
            image.draft("RGB", (size, size))
            small = oriented(image).convert("RGB")
            small.thumbnail((size, size))
            out = io.BytesIO()
            small.save(out, "JPEG", quality=80)
            details["thumbnail"] = out.getvalue()
    return details
