"""Rows of images from any source that Hugging Face `datasets` reads, decoded as in the server."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import datasets
from PIL import Image
from rich.console import Console
from rich.progress import track

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import (
    SUFFIXES,
    count_kinds,
    decode,
    is_image_file,
    list_images,
    without_heic,
)
from radapter_serve.contract.labels import split_label
from radapter_serve.data.source import INDEX
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import open_table
from radapter_serve.sources import from_hub_or_cache, how_to_bring, refused, unreachable

SPLIT_FILES = ("coop", "karpathy")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
READERS = ("imagefolder", "csv", "json", "parquet", "webdataset", *SPLIT_FILES, INDEX)
_KINDS = f"{', '.join(f'{name}:PATH' for name in READERS)}, or a hub name"
MANY = 1000  # images that are announced where there is no bar

T = TypeVar("T")
_Splits = dict[str, list[dict[str, Any]]]


class BrokenImage(RAdapterError):
    """An image that is missing or can't be decoded."""


class LabelledImages(ABC):
    """Images whose labels are classes, for training and validation."""

    rows: Any  # a sequence, or a Hugging Face data set
    classes: list[str]  # in the order of the labels, with synonyms after commas
    templates: Sequence[str]  # prompt templates; each training pair draws one

    @property
    def image_rows(self) -> Any:
        """A row for each image, or for each segment that is shown as one."""
        return self.rows

    @abstractmethod
    def image(self, row: Any) -> Image.Image:
        """The image of a row; raises BrokenImage."""

    @abstractmethod
    def labels_of(self, row: Any) -> tuple[int, ...]:
        """The numbers of all classes of a row, in the row's order, without repetition."""

    def pair(self, row: Any, draw: random.Random) -> tuple[Image.Image, int | tuple[int, ...], str]:
        """The image, the numbers of its classes, and a prompt of one of them,
        which is the first.
        """
        labels = self.labels_of(row)
        image = self.image(row)
        label = labels[0]
        if len(labels) == 1:
            return image, label, self.prompt(label, draw)
        label = draw.choice(labels)
        others = [other for other in labels if other != label]
        return image, (label, *others), self.prompt(label, draw)

    def prompt(self, label: int, draw: random.Random) -> str:
        """A prompt with the first name of a class, from a randomly drawn template."""
        name = split_label(self.classes[label])[0]
        return draw.choice(self.templates).replace("{}", name)


class ImageColumn:
    """Reads the images of rows from a column of paths, bytes or both."""

    image_column: str
    folder: Path  # relative paths start here
    exif_orientation: bool  # turn images according to their EXIF

    def image(self, row: dict[str, Any]) -> Image.Image:
        """The image of a row, decoded as in the server."""
        return decode_named(self.data(row), self.name(row), exif_orientation=self.exif_orientation)

    def data(self, row: dict[str, Any]) -> bytes:
        """The bytes of a row's image file, of a HEIC as JPEG."""
        value = row.get(self.image_column)
        if value is None:
            raise BrokenImage(f"a row has no image in the column {self.image_column!r}")
        source = image_source(value)
        folder = Path() if isinstance(value, dict) else self.folder
        if isinstance(source, bytes):
            return read_named(lambda: source, self.name(row))
        return read_named((folder / source).read_bytes, self.name(row))

    def name(self, row: dict[str, Any]) -> str:
        """The name of a row's image in messages."""
        value = row.get(self.image_column)
        path = value.get("path") if isinstance(value, dict) else value
        return path if isinstance(path, str) else "in the table"


def read_named(read: Callable[[], bytes], name: str | Path) -> bytes:
    """The bytes that `read` returns, of a HEIC as JPEG; errors have the `name` of the image."""
    try:
        return without_heic(read())
    except OSError as error:
        raise BrokenImage(f"image {name} can't be read: {error.strerror or error}") from None
    except TaskError as error:
        raise BrokenImage(f"image {name} can't be read: {error.what}") from None


def decode_named(data: bytes, name: str | Path, *, exif_orientation: bool = True) -> Image.Image:
    """Decode an image file as the server does; errors have the `name` of the image."""
    try:
        return decode(data, exif_orientation=exif_orientation)
    except RAdapterError as error:
        raise BrokenImage(f"image {name} can't be read: {getattr(error, 'what', error)}") from None


@dataclass(frozen=True)
class Rows:
    """Rows of images, not decoded."""

    table: Any  # a Hugging Face data set
    folder: Path  # relative image paths start here
    class_folders: bool = False  # True for files of class folders, whose names are the labels
    # Number of files in class folders that are not images, by suffix.
    left_out: Mapping[str, int] = field(default_factory=dict)


def open_rows(spec: str, columns: Mapping[str, str]) -> Rows:
    """Open rows of any source, without decoding images; `columns` has the flags of its columns."""
    # Find the reader, the place and the split; the name of a file or folder may contain @.
    place = spec
    at = ""
    split = "train"
    reader, _, path = spec.partition(":")
    if "@" in spec.rsplit("/", 1)[-1] and not (reader in READERS and Path(path).exists()):
        place, at, split = spec.rpartition("@")
        reader, _, path = place.partition(":")
    if "::" in place or place == "pandas":
        raise RAdapterError(
            f"could not read the data {spec}: chained addresses (A::B) and pickled tables may run"
            " foreign code; name the file itself"
        )
    folder = Path(path).parent if reader in READERS else Path()
    if reader == "imagefolder":  # class folders are in DIR/SPLIT, if it has any, else in DIR
        folder = Path(path)
        part = folder / split
        divided = part.is_dir() and bool(sub_folders(part))
        if not folder.is_dir() or (at and split != "train" and not divided):
            missing = part if folder.is_dir() else folder
            raise RAdapterError(
                f"no folder {missing} for {spec}{_like(missing)}: one sub-folder a class"
            )
        folder = part if divided else folder
        return _rows_of_classes(folder, spec, columns)
    if reader == INDEX:
        return _rows_of_index(Path(path), spec, columns)

    # Read the table. datasets, pyarrow and the hub raise many kinds of errors, which all mean that
    # the data can't be read.
    try:
        if reader in SPLIT_FILES:
            table = _open_splits(reader, Path(path), split if at else None)
        else:
            table = _load(place, split)
    except RAdapterError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer errors of datasets give no reason
            cause = cause.__cause__
        why = reason(cause)
        if "corresponds to no data" in why or "BatchSize must be greater than 0" in why:
            why = "it holds no rows"
        why += "; save the file as UTF-8" if isinstance(cause, UnicodeDecodeError) else ""
        raise RAdapterError(f"could not read the data {spec}: {why}; allowed: {_KINDS}") from error
    features = table.features or {}
    for column, flag in columns.items():
        if features and column not in features:
            raise RAdapterError(
                f"{spec} has no column {column!r}; its columns: {', '.join(features)}; see {flag}"
            )
        if isinstance(features.get(column), datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return Rows(table, folder)


def _load(place: str, split: str) -> Any:
    """Read rows with Hugging Face `datasets`: one file or several, or a name on the hub."""
    reader, _, path = place.partition(":")
    datasets.disable_progress_bars()
    if reader in READERS:
        is_local = "://" not in path
        if is_local and not glob.has_magic(path) and not Path(path).is_file():
            raise RAdapterError(
                f"could not read the data {place}: there is no file {path}; allowed: {_KINDS}"
            )
        if is_local and reader != "webdataset":
            for file in glob.glob(path) or [path]:  # noqa: PTH207 - the path may be absolute
                open_table(Path(file)).close()
        return datasets.load_dataset(reader, split=split, data_files={split: [path]})
    if Path(place).exists():
        return datasets.load_dataset(place, split=split)
    if not _HUB_NAME.fullmatch(place):
        raise RAdapterError(
            f"could not read the data {place}: there is no such folder{_like(Path(place))};"
            f" allowed: {_KINDS}"
        )
    try:
        with from_hub_or_cache():
            return datasets.load_dataset(place, split=split)
    except Exception as error:
        if not unreachable():
            raise RAdapterError(
                f"there is no folder {place}{_like(Path(place))}, and as a data set of the Hugging"
                f" Face hub it can't be read: {refused(error)}; allowed: {_KINDS}"
            ) from error
        raise RAdapterError(
            f"there is no folder {place}{_like(Path(place))}, and no data set of that name on this"
            f" machine. The Hugging Face hub can't be reached ({unreachable()}); if the data is"
            f" there, {how_to_bring(place, 'dataset')}"
        ) from error


def _like(folder: Path) -> str:
    """The folders beside one that is missing whose names are like its own, for a message."""
    with contextlib.suppress(OSError):
        names = get_close_matches(folder.name, sorted(sub_folders(folder.parent)), cutoff=0.5)
        if names:
            near = ", ".join(str(folder.parent / name) for name in names)
            return f" (there are others, such as {near})"
    return ""


def _open_splits(kind: str, path: Path, names: str | None) -> Any:
    """Open one split, or several joined, of the files that CoOp and Karpathy published."""
    try:
        content = json.loads(path.read_bytes())
        splits, features = (_coop if kind == "coop" else _karpathy)(content)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "CoOp's" if kind == "coop" else "Karpathy's"
        raise RAdapterError(
            f"could not read {path} as a file of {what} splits: {type(error).__name__}:"
            f" {reason(error)}"
        ) from None
    wanted = list(dict.fromkeys((names or "").split("+")))
    missing = [name for name in wanted if not splits.get(name)]
    if missing:
        has = ", ".join(sorted(name for name, rows in splits.items() if rows)) or "no images at all"
        lacks = f"has no images of the split {missing[0]!r}" if missing[0] else "needs a split"
        raise RAdapterError(
            f"{path} {lacks}; it has {has}; name one as in {kind}:FILE@test, or several as in"
            " @train+val"
        )
    return datasets.Dataset.from_list([row for name in wanted for row in splits[name]], features)


def _coop(content: Any) -> tuple[_Splits, datasets.Features]:
    """Read `{"train": [[path, number, name], ...], "val": ..., "test": ...}`."""
    splits: _Splits = {}
    classes: dict[int, str] = {}
    for split, rows in content.items():
        splits[split] = []
        for path, number, name in rows:
            if [type(value) for value in (path, number, name)] != [str, int, str]:
                raise TypeError(f"unexpected types in {str([path, number, name])[:80]}")
            if classes.setdefault(number, name) != name:
                raise ValueError(f"the class {number} is both {classes[number]!r} and {name!r}")
            splits[split].append({"image": path, "label": number})
    names = [classes[number] for number in sorted(classes)]
    if sorted(classes) != list(range(len(classes))) or len(set(names)) < len(names):
        raise ValueError("the classes must be numbered from 0 on, and their names must differ")
    return splits, datasets.Features(
        {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )


def _karpathy(content: Any) -> tuple[_Splits, datasets.Features]:
    """Read `{"images": [{"filename", perhaps "filepath", "split", "sentences": [{"raw"}, ...]},
    ...]}`.
    """
    splits: _Splits = {}
    for image in content["images"]:
        folder = image.get("filepath", "")
        name = image["filename"]
        captions = [sentence["raw"] for sentence in image["sentences"]]
        if not all(isinstance(text, str) for text in (folder, name, image["split"], *captions)):
            raise TypeError(f"unexpected types in {str(image)[:80]}")
        splits.setdefault(image["split"], []).append(
            {"image": str(Path(folder, name)), "caption": captions}
        )
    text = datasets.Value("string")
    return splits, datasets.Features({"image": text, "caption": datasets.List(text)})


def _rows_of_classes(folder: Path, spec: str, columns: Mapping[str, str]) -> Rows:
    """Rows of the images in class folders, with the columns `image`, a path, and `label`."""
    for column, flag in columns.items():
        if column not in ("image", "label"):
            raise RAdapterError(
                f"{spec} has no column {column!r}; its columns: image, label; see {flag}"
            )
    listed = {name: list_images(folder / name) for name in sorted(sub_folders(folder))}
    loose = [
        entry.name for entry in folder.iterdir() if is_image_file(entry.name) and entry.is_file()
    ]
    if loose:
        raise RAdapterError(
            f"{len(loose)} images of {spec} lie outside of the class folders, such as"
            f" {folder / min(loose)}; move each into the folder of its class"
        )
    left_out: Counter[str] = Counter()
    for files in listed.values():
        left_out.update(files.left_out)
    filled = {name: files.images for name, files in listed.items() if files.images}
    if len(filled) < 2:
        has = "no images in sub-folders"
        if filled:
            has = f"images in only one folder, {next(iter(filled))!r}"
        raise RAdapterError(
            f"{spec} has {has}; an image folder needs one sub-folder a class, and two classes;"
            f" images are {', '.join(SUFFIXES)}"
            + (f"; it has {count_kinds(left_out)}" if left_out else "")
        )
    names = list(filled)
    paths = sorted(
        (str(file.absolute()), number) for number, name in enumerate(names) for file in filled[name]
    )
    columns_of = {"image": [path for path, _ in paths], "label": [number for _, number in paths]}
    features = datasets.Features(
        {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    try:
        table = datasets.Dataset.from_dict(columns_of, features)
    except UnicodeEncodeError as error:
        raise RAdapterError(
            f"a name in {folder} is not UTF-8: {error.object!r}; rename it"
        ) from None
    return Rows(table, folder, True, left_out)


def _rows_of_index(folder: Path, spec: str, columns: Mapping[str, str]) -> Rows:
    """Rows of the images in an index, with its columns, and their ids in the column of images."""
    from radapter_serve.index.folder import FolderIndex

    index = FolderIndex(folder, codes=False)
    image_column, *others = columns
    has = [name for name in index.facts.columns if name != "path"]
    for column in others:
        if column not in has:
            raise RAdapterError(
                f"{spec} has no column {column!r}; its columns: {', '.join(has) or 'none'}; see"
                f" {columns[column]}; an index has the columns of the table that it was built from"
            )
    batches = list(index.rows(["path", *others], MANY))
    names = [image_column, *others]
    values: dict[str, list[Any]] = {name: [] for name in names}
    for batch in batches:
        for name, column in zip(names, batch.columns, strict=True):
            values[name] += column.to_pylist()
    return Rows(datasets.Dataset.from_dict(values), Path(index.facts.plan.root))


def image_source(value: Any) -> bytes | str:
    """The bytes of an image file, or else its path, from a value of the image column."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    return value if isinstance(value, bytes) else str(value)


def share_of(count: int, fraction: float) -> int:
    """Number of images to hold out of `count`: at least one, but never all."""
    return min(count - 1, max(1, round(fraction * count))) if count else 0


def check_share(count: int, fraction: float) -> int:
    """`share_of` of all images of a data set; an error if no image is held out."""
    if share := share_of(count, fraction):
        return share
    raise RAdapterError(f"val_fraction is {fraction} but there is one image; name validation data")


def tracked(items: Iterable[T], count: int, what: str, progress: bool) -> Iterable[T]:
    """The items, with a bar in a terminal; elsewhere a line announces many."""
    console = Console(stderr=True, quiet=not progress)
    in_terminal = progress and console.is_terminal
    if not in_terminal and count >= MANY:
        console.print(f"{what} {count:,} images", highlight=False)
    return track(
        items, f"{what} images", count, console=console, transient=True, disable=not in_terminal
    )


def sub_folders(path: Path) -> set[str]:
    """Names of the sub-folders of a folder, without hidden ones."""
    return {
        entry.name
        for entry in os.scandir(path)
        if entry.is_dir() and not entry.name.startswith(".")
    }
