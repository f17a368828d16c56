"""What a command gives: tables, JSON lines, CSV, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._exceptions import RAdapterClientError
from .inputs import ImageFiles

Row = dict[str, Any]
Found = tuple[Row, list[Row]]  # an image's answer as one JSON object, and as rows of a table


def check_output(flag: str, path: Path, *suffixes: str) -> None:
    """Fails before any work where the file could not be written after it."""
    if path.suffix.lower() not in suffixes:
        raise RAdapterClientError(f"{flag} {path} does not end in {' or '.join(suffixes)}")
    if not path.parent.is_dir() or path.is_dir():
        raise RAdapterClientError(
            f"{flag} {path}: {path.parent} is no folder, or the file itself is one"
        )


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except OSError as error:
        raise RAdapterClientError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Pictures:
    """A picture for each image: a file for one image, a folder for several.

    Args:
        flag: that names the file or the folder.
        path: its value; None where no pictures are wanted.
        images: what the pictures are of.
        suffixes: endings that a file may have.
    """

    def __init__(self, flag: str, path: Path | None, images: ImageFiles, *suffixes: str) -> None:
        self._path = path
        self._images = images
        if path is None:
            return
        if images.one:
            check_output(flag, path, *suffixes)
        elif path.suffix.lower() in suffixes or path.is_file():
            raise RAdapterClientError(
                f"{flag} {path}: of several images, give a folder for their pictures"
            )

    def write(self, image: str, picture: Image.Image) -> None:
        assert self._path is not None
        path = self._path
        if not self._images.one:
            path = path / f"{self._images.relative(image)}.png"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RAdapterClientError(f"cannot make {path.parent}: {error.strerror}") from error
        write_whole(
            path,
            lambda file: picture.save(
                file, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=90
            ),
        )


def report(found: Iterable[Found], columns: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Prints the answers, or writes them to a file.

    Args:
        found: comes one by one, and is printed or written as it comes, but for a table.
        columns: of the table and of CSV.
        out: .csv or .jsonl.
        as_json: print JSON lines, or where they are, instead of a table.
    """
    if out is not None:
        check_output("--out", out, ".csv", ".jsonl")
        count = 0

        def write(file: BinaryIO) -> None:
            nonlocal count
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
            table = csv.DictWriter(text, columns, lineterminator="\n")
            as_csv = out.suffix.lower() == ".csv"
            if as_csv:
                table.writeheader()
            for whole, rows in found:
                count += 1
                if as_csv:
                    table.writerows(rows)
                else:
                    text.write(to_json(whole) + "\n")
            text.detach()

        write_whole(out, write)
        print(to_json({"file": str(out), "images": count}) if as_json else f"{out}: {count} images")
    elif as_json:
        for whole, _ in found:
            print(to_json(whole), flush=True)
    else:
        shown = Table()
        for column in columns:
            shown.add_column(column, justify="left" if column in ("image", "label") else "right")
        for _, rows in found:
            for index, row in enumerate(rows):
                cells = [_cell(column, row[column]) for column in columns]
                shown.add_row(
                    *(["", *cells[1:]] if index else cells), end_section=index + 1 == len(rows)
                )
        Console().print(shown)


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(column: str, value: Any) -> Text:
    if column == "share":
        return Text(f"{value * 100:.1f} %")
    return Text(f"{value:.4f}" if isinstance(value, float) else value)
