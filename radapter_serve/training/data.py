"""Training data: any labelled images that Hugging Face `datasets` reads, in an order that a seed fixes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import open_clip
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from radapter_serve.errors import RAdapterError
from radapter_serve.serving.labels import read_label_file, read_templates, split_label
from radapter_serve.serving.preprocess import decode

READERS = ("imagefolder", "csv", "json", "parquet", "webdataset")
Transform = Callable[[Image.Image], Tensor]


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
        self._index = {name: i for i, line in enumerate(self.classes) for name in split_label(line)}

    def image(self, row: dict[str, Any]) -> Image.Image:
        """The image of a row, decoded as the server decodes it; raises RAdapterError or OSError."""
        value = row[self.image_column]
        if isinstance(value, dict):
            data = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        else:
            data = value if isinstance(value, bytes) else (self.folder / str(value)).read_bytes()
        return decode(data)

    def label(self, row: dict[str, Any]) -> int:
        """The number of a row's class.

        Raises:
            RAdapterError: no class of that name or number.
        """
        value = row[self.label_column]
        index = self._index.get(value, -1) if isinstance(value, str) else int(value)
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
    place, _, split = spec.rpartition("@") if "@" in spec.rsplit("/", 1)[-1] else (spec, "", "train")
    reader, _, path = place.partition(":")
    local = reader in READERS
    if local and reader == "imagefolder" and not Path(path).is_dir():
        raise RAdapterError(f"no folder {path} for --data {spec}; it must hold one sub-folder of images a class")
    source: dict[str, Any] = {"data_dir" if reader == "imagefolder" else "data_files": path} if local else {}
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(reader if local else place, split=split, streaming=streaming, **source)
    except Exception as error:  # datasets, pyarrow and the hub raise many kinds, and all mean: can't be read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kinds = ", ".join(f"{name}:PATH" for name in READERS)
        raise RAdapterError(f"could not read the data {spec}: {reason}; allowed: {kinds}, or a hub name") from error
    features = rows.features or {}
    for column, flag in ((image_column, "--image-column"), (label_column, "--label-column")):
        if features and column not in features:
            hint = " (an image folder needs one sub-folder a class)" if reader == "imagefolder" else ""
            raise RAdapterError(
                f"{spec} has no column {column!r}{hint}; its columns: {', '.join(features)}; see {flag}"
            )
    if isinstance(features.get(image_column), datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    own = getattr(features.get(label_column), "names", None)
    names = read_label_file(classes) if classes else own
    if names is None and not streaming and "string" in getattr(features.get(label_column), "dtype", ""):
        names = sorted(set(rows[label_column]))
    if names is None:
        raise RAdapterError(f"{spec} does not name its classes; give a file with one class a line: --classes FILE")
    folder = Path(path).parent if local and reader != "imagefolder" else Path()
    data = Labelled(rows, list(names), image_column, label_column, folder)
    _check_classes(data, spec, own, Path(path) if reader == "imagefolder" else None)
    return data


def _check_classes(data: Labelled, spec: str, own: list[str] | None, folder: Path | None) -> None:
    if own is not None and len(own) != len(data.classes):
        raise RAdapterError(
            f"the class file names {len(data.classes)} classes but {spec} has {len(own)}: "
            f"{', '.join(own[:8])}{', ...' if len(own) > 8 else ''}; write one line for each, in this order"
        )
    if folder is not None and own is not None:
        held = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
        empty = sorted(held - set(own)) if held & set(own) else []
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


def templates_of(source: str) -> list[str]:
    """Prompt templates by name (`simple`, `openai`) or from a file."""
    if source == "openai":
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return read_templates(source)


@dataclass
class Examples(Dataset[dict[str, Any]]):
    """Items of a training batch: pixels, the label, a prompt; each depends on (seed, epoch, index) alone.

    Attributes:
        data: the images.
        transform: augmentation, to float [3, S, S].
        templates: one is drawn an item.
        seed, epoch: what the draw depends on beside the index.
        refuse: stop at a broken image rather than take the next one.
    """

    data: Labelled
    transform: Transform
    templates: list[str]
    seed: int
    epoch: int = 0
    refuse: bool = True

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        broken: list[str] = []
        for offset in range(len(self)):
            row = self.data.rows[(index + offset) % len(self)]
            try:
                return {**self.item(row, index), "broken": broken}
            except _BrokenImage as error:
                if self.refuse:
                    raise RAdapterError(f"{error}; mend it, or leave such images out with --on-broken skip") from None
                broken.append(str(error))
        raise RAdapterError("not one image of the data set can be read")

    def item(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """One row, augmented by the draw that belongs to its index."""
        label = self.data.label(row)
        try:
            image = self.data.image(row)
        except (RAdapterError, OSError) as error:
            value = row[self.data.image_column]
            name = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else f"row {index}"
            raise _BrokenImage(f"image {name} can't be read: {error}") from None
        draw = random.Random(f"{self.seed}-{self.epoch}-{index}")
        name = split_label(self.data.classes[label])[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.getrandbits(63))
            pixels = self.transform(image)
        return {"pixels": pixels, "label": label, "text": draw.choice(self.templates).replace("{}", name)}


class _BrokenImage(Exception):
    pass


class _Stream(IterableDataset[dict[str, Any]]):
    """The same items from a stream: shuffled in a buffer, cut by process, started behind `skip` items."""

    def __init__(self, examples: Examples, rank: int, world: int, skip: int) -> None:
        rows = examples.data.rows.shuffle(seed=examples.seed + examples.epoch, buffer_size=1000)
        self.rows, self.examples, self.first = split_dataset_by_node(rows, rank, world).skip(skip), examples, skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        broken: list[str] = []
        for index, row in enumerate(self.rows, self.first):
            try:
                yield {**self.examples.item(row, index), "broken": broken}
                broken = []
            except _BrokenImage as error:
                if self.examples.refuse:
                    raise RAdapterError(f"{error}; mend it, or leave such images out with --on-broken skip") from None
                broken.append(str(error))


def batches(
    examples: Examples, batch_size: int, *, epoch: int, start: int, rank: int, world: int, workers: int
) -> DataLoader[dict[str, Any]]:
    """One epoch's batches of one process, from a batch on.

    Args:
        examples: the items.
        batch_size: items a batch and process; the last, smaller batch is left out.
        epoch: fixes the order, with the seed.
        start: batches to leave out, because they were seen before a restart.
        rank, world: number of this process and of all.
        workers: reading processes.
    """
    examples.epoch = epoch
    common: dict[str, Any] = {"collate_fn": _collate, "num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if not isinstance(examples.data.rows, datasets.Dataset):
        common["num_workers"] = min(workers, 1)  # one reader keeps the order
        stream = _Stream(examples, rank, world, start * batch_size)
        return DataLoader(stream, batch_size=batch_size, drop_last=True, **common)
    generator = torch.Generator().manual_seed(examples.seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator)[rank::world].tolist()
    chunks = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)][start:]
    return DataLoader(examples, batch_sampler=chunks, **common)  # type: ignore[arg-type]


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixels": torch.stack([item["pixels"] for item in items]),
        "labels": torch.tensor([item["label"] for item in items]),
        "texts": [item["text"] for item in items],
        "broken": [name for item in items for name in item["broken"]],
    }
