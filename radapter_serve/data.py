"""Labelled images from wherever Hugging Face `datasets` reads them, decoded as the server decodes them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from radapter_serve.base import Base
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.serving.labels import read_label_file, split_label
from radapter_serve.serving.preprocess import decode

READERS = ("imagefolder", "csv", "json", "parquet", "webdataset")


class BrokenImage(RAdapterError):
    """An image that is missing or can't be decoded."""


@dataclass
class Labelled:
    """A data set of labelled images.

    Attributes:
        rows: a Hugging Face data set; images are not decoded by it.
        classes: one entry a class, in the order of the labels, synonyms after commas.
        image_column, label_column: names of the two columns.
        folder: what relative image paths are relative to.
    """

    rows: Any
    classes: list[str]
    image_column: str
    label_column: str
    folder: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        names = [(line, split_label(line)) for line in self.classes]
        self._index = {name: i for i, (_, synonyms) in enumerate(names) for name in synonyms}
        self._index |= {synonyms[0]: i for i, (_, synonyms) in enumerate(names)}  # a first name beats a synonym
        self._index |= {line: i for i, (line, _) in enumerate(names)}

    def image(self, row: dict[str, Any]) -> Image.Image:
        """The image of a row, decoded as the server decodes it.

        Raises:
            BrokenImage: it is missing, or no image; says which.
        """
        data = self.data(row)
        try:
            return decode(data)
        except RAdapterError as error:
            raise BrokenImage(f"image {self.name(row)} can't be read: {getattr(error, 'message', error)}") from None

    def data(self, row: dict[str, Any]) -> bytes:
        """The bytes of a row's image file.

        Raises:
            BrokenImage: it is missing; says which.
        """
        value = row[self.image_column]
        try:
            if isinstance(value, dict):
                return bytes(value["bytes"]) if value.get("bytes") is not None else Path(value["path"]).read_bytes()
            return value if isinstance(value, bytes) else (self.folder / str(value)).read_bytes()
        except OSError as error:
            raise BrokenImage(f"image {self.name(row)} can't be read: {error.strerror or error}") from None

    def name(self, row: dict[str, Any]) -> str:
        """What to call a row's image in a message."""
        value = row[self.image_column]
        path = value.get("path") if isinstance(value, dict) else value
        return path if isinstance(path, str) else "in the table"

    def label(self, row: dict[str, Any]) -> int:
        """The number of a row's class.

        Raises:
            RAdapterError: no class of that name or number.
        """
        value = row[self.label_column]
        try:
            index = self._index.get(value, -1) if isinstance(value, str) else int(value)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < len(self.classes):
            raise RAdapterError(
                f"label {value!r} is none of the {len(self.classes)} classes ({', '.join(self.classes[:5])}, ...); "
                f"name every class of {self.label_column!r} in the file given with --classes"
            )
        return index


def load_labelled(
    spec: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    classes: Path | None = None,
    streaming: bool = False,
) -> Labelled:
    """Open a data set.

    Args:
        spec: `imagefolder:DIR`, `csv:FILE`, `json:FILE`, `parquet:FILE`, `webdataset:FILE` (globs too) or a name on the
            Hugging Face hub; `@SPLIT` at the end names a split, `train` by default.
        image_column: paths, bytes or images.
        label_column: class names or numbers.
        classes: label file in the order of the labels; None takes the data set's own names.
        streaming: read row by row.

    Raises:
        RAdapterError: it can't be read, a column is missing, a class has no image, or the classes do not match.
    """
    rows, folder = open_rows(
        spec, {image_column: "--image-column", label_column: "--label-column"}, streaming=streaming
    )
    features = rows.features or {}
    own = getattr(features.get(label_column), "names", None)
    names = read_label_file(classes) if classes else own
    if names is None and not streaming and "string" in getattr(features.get(label_column), "dtype", ""):
        names = sorted({value for value in rows[label_column] if value is not None})
    if names is None:
        raise RAdapterError(f"{spec} does not name its classes; give a file with one class a line: --classes FILE")
    class_folders = spec.startswith("imagefolder:")
    data = Labelled(rows, list(names), image_column, label_column, Path() if class_folders else folder)
    _check_classes(data, spec, own, folder if class_folders else None)
    return data


def open_rows(spec: str, columns: Mapping[str, str], *, streaming: bool = False) -> tuple[Any, Path]:
    """Open rows of any kind, the images in them not decoded.

    Args:
        spec: as of `load_labelled`.
        columns: those that must be there, each with the flag that names it.
        streaming: read row by row.

    Returns:
        A Hugging Face data set, and the folder of its file: relative image paths start there. Of an image folder,
        the folder of class folders.

    Raises:
        RAdapterError: it can't be read, or a column is missing.
    """
    place, _, split = spec.rpartition("@") if "@" in spec.rsplit("/", 1)[-1] else (spec, "", "train")
    reader, _, path = place.partition(":")
    local = reader in READERS
    source: dict[str, Any] = {"data_files": {split: [path]}} if local else {}
    if reader == "imagefolder":
        path = str(_image_folder(Path(path), split, spec))
        # named as one split: left alone, datasets takes "train" or "test" in any file's name for a split
        source = {"data_files": {split: [f"{glob.escape(path)}/**"]}}
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(reader if local else place, split=split, streaming=streaming, **source)
    except Exception as error:  # datasets, pyarrow and the hub raise many kinds, and all mean: can't be read
        kinds = ", ".join(f"{name}:PATH" for name in READERS)
        raise RAdapterError(
            f"could not read the data {spec}: {reason(error)}; allowed: {kinds}, or a hub name"
        ) from error
    features = rows.features or {}
    for column, flag in columns.items():
        if features and column not in features:
            hint = " (an image folder needs one sub-folder a class)" if reader == "imagefolder" else ""
            raise RAdapterError(
                f"{spec} has no column {column!r}{hint}; its columns: {', '.join(features)}; see {flag}"
            )
        if isinstance(features.get(column), datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    folder = Path(path) if reader == "imagefolder" else Path(path).parent if local else Path()
    return rows, folder


def _image_folder(path: Path, split: str, spec: str) -> Path:
    """The folder of class folders: DIR/SPLIT where it has some, else DIR."""
    folder = path / split if path.joinpath(split).is_dir() and _folders(path / split) else path
    if not folder.is_dir() or (folder == path and "@" in spec and split != "train"):
        raise RAdapterError(f"no folder {path / split if path.is_dir() else path} for {spec}: one sub-folder a class")
    return folder


def _folders(path: Path) -> set[str]:
    return {entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")}


def _check_classes(data: Labelled, spec: str, own: list[str] | None, folder: Path | None) -> None:
    if own is not None and len(own) != len(data.classes):
        raise RAdapterError(
            f"the class file names {len(data.classes)} classes but {spec} has {len(own)}: "
            f"{', '.join(own[:8])}{', ...' if len(own) > 8 else ''}; write one line for each, in this order"
        )
    lines = [split_label(line) for line in data.classes]
    known = own is not None and all(any(name in line for line in lines) for name in own)
    if own is not None and known and any(name not in line for name, line in zip(own, lines, strict=True)):
        names = f"{', '.join(own[:8])}{', ...' if len(own) > 8 else ''}"
        raise RAdapterError(f"the class file has the names of {spec} in another order; write them as: {names}")
    if folder is not None and own is not None:
        empty = sorted(_folders(folder) - set(own))
        if empty:
            raise RAdapterError(
                f"the class folder {empty[0]!r} of {spec} holds no image; add some or remove the folder"
            )
    if isinstance(data.rows, datasets.Dataset):
        if len(data.rows) == 0:
            raise RAdapterError(f"{spec} holds no images")
        present = {data.label({data.label_column: value}) for value in set(data.rows[data.label_column])}
        missing = [name for index, name in enumerate(data.classes) if index not in present]
        if missing:
            raise RAdapterError(
                f"the class {missing[0]!r} has no image in {spec} ({len(missing)} of {len(data.classes)} classes are "
                f"empty); add images or take it out of the class file"
            )


def evaluation_batches(
    base: Base, data: Labelled, batch_size: int = 64, *, rank: int = 0, world: int = 1, broken: list[str] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels, as open_clip's own transform makes them, and labels of a data set.

    Args:
        base: whose preprocessing is used.
        data: not a stream.
        batch_size: images a batch.
        rank, world: number of this process and of all; each gets its share.
        broken: takes the names of images that can't be read, which are then left out; None raises BrokenImage.
    """
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    rows = range(rank, len(data.rows), world)
    for first in range(0, len(rows), batch_size):
        pixels, labels = [], []
        for index in rows[first : first + batch_size]:
            row = data.rows[index]
            try:
                pixels.append(transform(data.image(row)))
            except BrokenImage as error:
                if broken is None:
                    raise
                broken.append(str(error))
            else:
                labels.append(data.label(row))
        if pixels:
            yield torch.stack(pixels), torch.tensor(labels)  # type: ignore[arg-type]
