"""Labelled images: each pair is an image and a prompt with its class's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from radapter_serve.clip.base import Base
from radapter_serve.data.rows import BrokenImage, ImageColumn, LabelledImages, open_rows, sub_folders
from radapter_serve.errors import RAdapterError
from radapter_serve.inputs.labels import read_label_file, split_label


@dataclass
class Labelled(ImageColumn, LabelledImages):
    """A data set of labelled images.

    Attributes:
        rows: a Hugging Face data set; images are not decoded by it.
        classes: one entry a class, in the order of the labels, synonyms after commas.
        image_column, label_column: names of the two columns.
        folder: what relative image paths are relative to.
        templates: prompt templates with `{}`, of which a training pair draws one.
        first_class: what labels that are numbers start from, where `classes` is a part of all classes.
    """

    rows: Any
    classes: list[str]
    image_column: str
    label_column: str
    folder: Path = field(default_factory=Path)
    templates: Sequence[str] = ("a photo of a {}.",)
    first_class: int = 0

    def __post_init__(self) -> None:
        names = [(line, split_label(line)) for line in self.classes]
        self._index = {name: i for i, (_, synonyms) in enumerate(names) for name in synonyms}
        self._index |= {synonyms[0]: i for i, (_, synonyms) in enumerate(names)}  # a first name beats a synonym
        self._index |= {line: i for i, (line, _) in enumerate(names)}

    def label(self, row: dict[str, Any]) -> int:
        """The number of a row's class.

        Raises:
            RAdapterError: no class of that name or number.
        """
        value = row[self.label_column]
        try:
            index = self._index.get(value, -1) if isinstance(value, str) else int(value) - self.first_class
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < len(self.classes):
            raise RAdapterError(
                f"label {value!r} is none of the {len(self.classes)} classes ({', '.join(self.classes[:5])}, ...); "
                f"name every class of {self.label_column!r} in the file given with --classes"
            )
        return index

    def labels(self) -> NDArray[np.int64]:
        """The numbers of all rows' classes, [N]; not of a stream."""
        values = self.rows[self.label_column]
        return np.fromiter((self.label({self.label_column: value}) for value in values), np.int64, len(self.rows))


def split_classes(count: int, split: str) -> range:
    """The numbers of the classes of a base-to-novel split, as CoOp cuts it: the first half is rounded up.

    Args:
        count: of all classes.
        split: `base` for the first half, `novel` for the second, `all` for all.
    """
    middle = (count + 1) // 2
    return {"all": range(count), "base": range(middle), "novel": range(middle, count)}[split]


def class_split(data: Labelled, split: str) -> Labelled:
    """The images of the base or of the novel classes, and these classes alone.

    Args:
        data: not a stream.
        split: of `split_classes`.

    Raises:
        RAdapterError: it is a stream, or the half has no class.
    """
    if split == "all":
        return data
    if isinstance(data.rows, datasets.IterableDataset):
        raise RAdapterError(f"class_split {split} needs all labels at once; it does not go with a stream")
    chosen = split_classes(len(data.classes), split)
    if not chosen:
        raise RAdapterError(f"class_split {split} of {len(data.classes)} class leaves none")
    labels = data.labels()
    rows = data.rows.select(np.flatnonzero((labels >= chosen.start) & (labels < chosen.stop)))
    classes = data.classes[chosen.start : chosen.stop]
    return dataclasses.replace(data, rows=rows, classes=classes, first_class=data.first_class + chosen.start)


def few_shot(data: Labelled, shots: int, seed: int) -> Labelled:
    """A few images of each class, drawn by the seed; a class with fewer gives all that it has, as in CoOp.

    More shots of the same seed hold the fewer.

    Args:
        data: not a stream.
        shots: images a class, 1 or more.
        seed: of the draw.

    Raises:
        RAdapterError: it is a stream.
    """
    if isinstance(data.rows, datasets.IterableDataset):
        raise RAdapterError("shots needs all labels at once; it does not go with a stream")
    order = np.random.default_rng(seed).permutation(len(data.rows))
    labels = data.labels()[order]
    chosen = [order[np.flatnonzero(labels == number)[:shots]] for number in range(len(data.classes))]
    return dataclasses.replace(data, rows=data.rows.select(np.sort(np.concatenate(chosen))))


def load_labelled(
    spec: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    classes: Path | None = None,
    templates: Sequence[str] = ("a photo of a {}.",),
    images: Path | None = None,
    streaming: bool = False,
    every_class: bool = True,
) -> Labelled:
    """Open a data set.

    Args:
        spec: `imagefolder:DIR`, `csv:FILE`, `json:FILE`, `parquet:FILE`, `webdataset:FILE` (globs too) or a name on the
            Hugging Face hub; `@SPLIT` at the end names a split, `train` by default.
        image_column: paths, bytes or images.
        label_column: class names or numbers.
        classes: label file in the order of the labels; None takes the data set's own names.
        templates: prompt templates with `{}`.
        images: folder that relative paths start from; None takes that of the file.
        streaming: read row by row.
        every_class: refuse classes without an image, which training needs and judging does not.

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
    start = images or (Path() if class_folders else folder)
    data = Labelled(rows, list(names), image_column, label_column, start, templates)
    _check_classes(data, spec, own, folder if class_folders else None, every_class)
    return data


def _check_classes(data: Labelled, spec: str, own: list[str] | None, folder: Path | None, every_class: bool) -> None:
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
        empty = sorted(sub_folders(folder) - set(own))
        if empty:
            raise RAdapterError(
                f"the class folder {empty[0]!r} of {spec} holds no image; add some or remove the folder"
            )
    if isinstance(data.rows, datasets.Dataset):
        if len(data.rows) == 0:
            raise RAdapterError(f"{spec} holds no images")
        present = set(data.labels().tolist())
        missing = [name for index, name in enumerate(data.classes) if index not in present]
        if missing and every_class:
            raise RAdapterError(
                f"the class {missing[0]!r} has no image in {spec} ({len(missing)} of {len(data.classes)} classes are "
                f"empty); add images or take it out of the class file"
            )


def evaluation_batches(
    base: Base,
    rows: Sequence[Any],
    read: Callable[[Any], tuple[Image.Image, int]],
    batch_size: int = 64,
    *,
    rank: int = 0,
    world: int = 1,
    broken: list[str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels, as open_clip's own transform makes them, and labels of images.

    Args:
        base: whose preprocessing is used.
        rows: not a stream.
        read: the image of a row and its label.
        batch_size: images a batch.
        rank, world: number of this process and of all; each gets its share.
        broken: takes the names of images that can't be read, which are then left out; None raises BrokenImage.
    """
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    mine = range(rank, len(rows), world)
    for first in range(0, len(mine), batch_size):
        pixels, labels = [], []
        for index in mine[first : first + batch_size]:
            try:
                image, label = read(rows[index])
                pixels.append(transform(image))
                labels.append(label)
            except BrokenImage as error:
                if broken is None:
                    raise
                broken.append(str(error))
        if pixels:
            yield torch.stack(pixels), torch.tensor(labels)  # type: ignore[arg-type]
