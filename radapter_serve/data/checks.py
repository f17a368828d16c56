"""All that is wrong with the data of a run, found at once and before anything is loaded or
fetched.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import track

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.image_files import spread
from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import verify
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import Labelled
from radapter_serve.data.masks import Masked
from radapter_serve.data.rows import BrokenImage
from radapter_serve.threads import decoders

MAX_DECODED = 10_000  # images of a data set, evenly spread
_BLOCK = 1000  # paths that a thread looks at in one go


def broken_images(
    data: Labelled | Captioned | Masked, max_decoded: int = MAX_DECODED, *, progress: bool = True
) -> list[str]:
    """Images that are missing or can't be decoded, a line each.

    Every file that the data names is looked for, also those that are not decoded.
    """
    images = _images(data)
    count = len(images.rows)
    chosen = spread(range(count), max_decoded)
    console = Console(stderr=True, quiet=not progress)
    if not console.is_terminal and len(chosen) >= _BLOCK:
        console.print(f"checking {len(chosen):,} of {count:,} images", highlight=False)
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(decoders(16)) as pool:
        if count > len(chosen):
            for missing in pool.map(images.missing, range(0, count, _BLOCK)):
                broken |= missing
        for number, line in track(
            zip(chosen, pool.map(images.broken, chosen), strict=True),
            "checking images",
            total=len(chosen),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        ):
            if line:
                broken[number] = line
    return [broken[number] for number in sorted(broken)]


@dataclass(frozen=True)
class _Images:
    """The image files of a data set."""

    rows: Sequence[Any]  # one for each image, for `data` and `name`
    # Of `_BLOCK` rows from a number on; empty where the table holds the bytes.
    paths: Callable[[int], Sequence[Path]]
    data: Callable[[Any], bytes]
    name: Callable[[Any], str]

    def missing(self, start: int) -> dict[int, str]:
        """The files of a block of rows that are not there."""
        return {
            number: f"image {path} can't be read: {os.strerror(errno.ENOENT)}"
            for number, path in enumerate(self.paths(start), start)
            if not path.is_file()
        }

    def broken(self, number: int) -> str:
        """Why an image can't be read; empty where it can."""
        row = self.rows[number]
        try:
            verify(self.data(row))
        except BrokenImage as error:
            return str(error)
        except TaskError as error:
            return f"image {self.name(row)} can't be read: {error.what}"
        return ""


def _images(data: Labelled | Captioned | Masked) -> _Images:
    if isinstance(data, Masked):
        files = data.images

        def paths_of_masked(start: int) -> Sequence[Path]:
            return [image.path for image in files[start : start + _BLOCK]]

        return _Images(
            files, paths_of_masked, lambda image: image.data(), lambda image: str(image.path)
        )
    table = data.rows if isinstance(data, Labelled) else data.table
    if isinstance(table, datasets.IterableDataset):
        return _Images([], lambda start: [], data.data, data.name)
    if isinstance(data, Captioned):
        table = table.select([image.row for image in data.images])
    table = table.select_columns([data.image_column])
    text = "string" in getattr(table.features[data.image_column], "dtype", "")

    def paths_of_table(start: int) -> Sequence[Path]:
        values = table[start : start + _BLOCK][data.image_column] if text else []
        return [data.folder / (value or "") for value in values]

    return _Images(table, paths_of_table, data.data, data.name)


def equal_names(data: Labelled | Masked) -> list[str]:
    """Classes whose names CLIP reads as the same, which differ in case, spaces and underscores
    alone.
    """
    own = data.own if isinstance(data, Labelled) else data.classes
    same: dict[str, list[str]] = {}
    for name, line in zip(own, data.classes, strict=True):
        plain = " ".join(split_label(line)[0].casefold().replace("_", " ").split())
        same.setdefault(plain, []).append(name)
    return [" and ".join(map(repr, names)) for names in same.values() if len(names) > 1]
