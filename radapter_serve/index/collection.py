"""The image files that an index is made of: those of a folder, or those that a table names with
their metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radapter_serve.contract.image_files import SUFFIXES, count_kinds, list_images
from radapter_serve.errors import RAdapterError, reason

# The columns of every index; a table's own may not have these names.
COLUMNS = ("path", "width", "height", "digest", "thumbnail", "vector")
Progress = Callable[[int, int], None]  # images done, of how many


@dataclass(frozen=True)
class Item:
    """An image file.

    Args:
        id: its path from the index's root, or its whole path if it lies elsewhere.
        file: its place.
        row: its row of the table; empty for a folder.
    """

    id: str
    file: Path
    row: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Collection:
    """The image files of a source.

    Args:
        source: as it can be opened from anywhere.
        root: folder that ids start from.
        items: folder by folder, or in the order of the table.
        columns: the table's columns without that of the images, as Arrow types by name.
        repeated: rows of the table left out, because an earlier one names the same image.
        left_out: number of files of other kinds in the folder, by the end of their names.
    """

    source: str
    root: Path
    items: list[Item]
    columns: dict[str, Any]
    repeated: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def open_collection(
    source: str, *, image_column: str = "image", root: Path | None = None
) -> Collection:
    """Find the images of a source.

    Args:
        source: a folder, read with all folders in it (`folder:DIR` if its name has a colon),
            `csv:FILE` or `parquet:FILE`, whose image paths start from the file's folder.
        image_column: of the table.
        root: folder that ids start from; the source's own folder if None.

    Raises:
        RAdapterError: there is no such source, it can't be read, or it holds no image.
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
    """Read a table of images as Arrow has it, with NaN as NULL.

    Args:
        path: of the file.
        image_column: the column that names the images.
        kind: "csv" or "parquet"; by the end of the file's name if None.

    Raises:
        RAdapterError: it can't be read, has no row, or a column that an index can't have.
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
