"""All that is wrong with the data of a run, found at once and before anything is loaded or
fetched.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import track

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import spread, verify
from radapter_serve.contract.labels import split_label
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import Labelled
from radapter_serve.data.masks import Masked
from radapter_serve.data.rows import BrokenImage
from radapter_serve.process import decoders

MAX_DECODED = 10_000  # images of a data set, evenly spread
_BLOCK = 1000  # paths that a thread looks at in one go


def broken_images(
    data: Labelled | Captioned | Masked, max_decoded: int = MAX_DECODED, *, progress: bool = True
) -> list[str]:
    """Images that are missing or can't be decoded, a line each.

    Every file that the data names is looked for, also those that are not decoded.
    """
    # A row for each image, and its path where the row names it.
    rows: Any
    if isinstance(data, Masked):
        rows = data.images
    else:
        rows = data.rows if isinstance(data, Labelled) else data.table
        if isinstance(rows, datasets.IterableDataset):
            return []
        if isinstance(data, Captioned):
            rows = rows.select([image.row for image in data.images])
        rows = rows.select_columns([data.image_column])

    def paths(start: int) -> list[Path]:
        """Of a block of rows; empty where the table holds the bytes."""
        if isinstance(data, Masked):
            return [image.path for image in rows[start : start + _BLOCK]]
        if "string" not in getattr(rows.features[data.image_column], "dtype", ""):
            return []
        values = rows[start : start + _BLOCK][data.image_column]
        return [data.folder / (value or "") for value in values]

    def missing(start: int) -> dict[int, str]:
        return {
            number: f"image {path} can't be read: {os.strerror(errno.ENOENT)}"
            for number, path in enumerate(paths(start), start)
            if not path.is_file()
        }

    def problem(number: int) -> str:
        """Why an image can't be read; empty where it can."""
        row = rows[number]
        try:
            verify(row.data() if isinstance(data, Masked) else data.data(row))
        except BrokenImage as error:
            return str(error)
        except TaskError as error:
            name = row.path if isinstance(data, Masked) else data.name(row)
            return f"image {name} can't be read: {error.what}"
        return ""

    # Look for all, and decode some.
    count = len(rows)
    chosen = spread(range(count), max_decoded)
    console = Console(stderr=True, quiet=not progress)
    if not console.is_terminal and len(chosen) >= _BLOCK:
        console.print(f"checking {len(chosen):,} of {count:,} images", highlight=False)
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(decoders(16)) as pool:
        if count > len(chosen):
            for block in pool.map(missing, range(0, count, _BLOCK)):
                broken |= block
        for number, line in track(
            zip(chosen, pool.map(problem, chosen), strict=True),
            "checking images",
            total=len(chosen),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        ):
            if line:
                broken[number] = line
    return [broken[number] for number in sorted(broken)]


def equal_names(data: Labelled | Masked) -> list[str]:
    """Classes whose names CLIP reads as the same, which differ in case, spaces and underscores
    alone.
    """
    names = data.own if isinstance(data, Labelled) else data.classes
    same: dict[str, list[str]] = {}
    for name, line in zip(names, data.classes, strict=True):
        plain = " ".join(split_label(line)[0].casefold().replace("_", " ").split())
        same.setdefault(plain, []).append(name)
    return [" and ".join(map(repr, equal)) for equal in same.values() if len(equal) > 1]
