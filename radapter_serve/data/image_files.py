"""Images alone, without labels: those of a folder, or those that a table names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_serve.contract.image_files import SUFFIXES, count_kinds, list_images
from radapter_serve.data.rows import READERS, ImageColumn, open_rows
from radapter_serve.errors import RAdapterError

_FOLDER = "imagefolder:"


@dataclass
class Images(ImageColumn):
    """Images, read one by one with `data` and `name`.

    Attributes:
        rows: one an image.
        folder: where relative paths start.
    """

    rows: Any
    folder: Path
    image_column: str = "image"
    exif_orientation: bool = True


def open_images(source: str, flag: str) -> Images:
    """Find the images of a source."""
    reader = source.partition(":")[0]
    if reader in READERS and not source.startswith(_FOLDER):
        found = open_rows(source, {"image": flag})
        if not len(found.table):
            raise RAdapterError(f"{source} holds no image; see {flag}")
        return Images(found.table, found.folder)
    folder = Path(source.removeprefix(_FOLDER)).absolute()
    if not folder.is_dir():
        raise RAdapterError(
            f"{source} is no folder; give {flag} a folder of images, csv:FILE or parquet:FILE"
        )
    files = list_images(folder)
    if not files.images:
        has = f"; it has {count_kinds(files.left_out)}" if files.left_out else ""
        raise RAdapterError(
            f"{source} holds no image; allowed are {', '.join(SUFFIXES)}, in any folder of it{has}"
        )
    return Images([{"image": str(file)} for file in files.images], folder)
