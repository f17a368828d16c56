"""The image files that an index is made of: all of a folder, or those that a table names with
their metadata.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radapter_serve.contract.image_files import SUFFIXES, count_kinds, list_images
from radapter_serve.errors import RAdapterError, reason

#: columns that every index has; a table's own may not be called so
COLUMNS = ("path", "width", "height", "digest", "thumbnail", "vector")


@dataclass(frozen=True)
class Item:
    """An image file.

    Args:
        id: what the index calls it: its path from the index's root, or its whole path
            where it lies elsewhere.
        file: where it lies.
        row: its row of the table; nothing for a folder.
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
        repeated: rows of the table left out, for an earlier one names the same image.
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
        source: a folder, read with all folders in it (`folder:DIR` where its name has a colon),
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
    return _of_table(kind, path, image_column, root)


def _id(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def _of_table(kind: str, path: Path, image_column: str, root: Path) -> Collection:
    table = _read(kind, path)
    if image_column not in table.column_names:
        raise RAdapterError(
            f"{path} has no column {image_column!r}; its columns: {', '.join(table.column_names)};"
            " see --image-column"
        )
    columns = {
        name: table.schema.field(name).type for name in table.column_names if name != image_column
    }
    _check_columns(columns, path)
    names = table[image_column].to_pylist()
    odd = next(
        (number for number, name in enumerate(names, 1) if not isinstance(name, str) or not name),
        None,
    )
    if odd is not None:
        raise RAdapterError(
            f"{path}, row {odd}: {image_column!r} is no path of an image ({names[odd - 1]!r:.60})"
        )
    items: dict[str, Item] = {}
    rows = table.drop_columns([image_column]).to_pylist() if columns else [{}] * len(names)
    for name, row in zip(names, rows, strict=True):
        file = Path(os.path.normpath(path.parent / name))
        item = Item(_id(file, root), file, row)
        items.setdefault(item.id, item)
    if not items:
        raise RAdapterError(f"{path} has no row, so there is nothing to index")
    return Collection(
        f"{kind}:{path}", root, list(items.values()), columns, len(names) - len(items)
    )


def _read(kind: str, path: Path) -> Any:
    import pyarrow
    from pyarrow import csv, parquet

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
    # A column without a value has no type; text is as good as any.
    for number, column in enumerate(table.schema):
        if pyarrow.types.is_null(column.type):
            table = table.set_column(number, column.name, table[column.name].cast(pyarrow.string()))
    return table


def _check_columns(columns: dict[str, Any], path: Path) -> None:
    import pyarrow

    for name, kind in columns.items():
        if (
            not name
            or name.lower() in COLUMNS
            or name.startswith("_")
            or "." in name
            or "`" in name
        ):
            raise RAdapterError(
                f"{path} has a column {name!r}; the index needs {', '.join(COLUMNS)} itself, and a"
                " name has no . or ` in it and no _ at its start; rename the column"
            )
        if (
            pyarrow.types.is_binary(kind)
            or pyarrow.types.is_large_binary(kind)
            or pyarrow.types.is_struct(kind)
        ):
            raise RAdapterError(
                f"the column {name!r} of {path} is {kind}; an index keeps text, numbers, yes or no,"
                " dates, and lists"
            )
