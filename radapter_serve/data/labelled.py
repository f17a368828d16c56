"""Labelled images: each pair is an image and a prompt with the name of its class, from the data, a
class file, or CLIP's names for ImageNet.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.images import SUFFIXES
from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.data.rows import ImageColumn, LabelledImages, open_rows, share_of, sub_folders
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError

IMAGENET = "imagenet"
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass
class Labelled(ImageColumn, LabelledImages):
    """A data set of labelled images."""

    rows: Any  # a Hugging Face data set
    classes: list[str]
    image_column: str
    label_column: str
    folder: Path = field(default_factory=Path)  # relative image paths start here
    templates: Sequence[str] = ("a photo of a {}.",)
    # Names of the classes in the data, such as those of their folders; `classes` if empty.
    keys: list[str] = field(default_factory=list)
    # Number of each class in the data, if labels are numbers; None for a class not in the data.
    numbers: Sequence[int | None] = ()
    exif_orientation: bool = True
    left_out: Mapping[str, int] = field(default_factory=dict)  # as in `Rows`
    label_separator: str | None = None  # between several labels in one text
    several: bool = False  # True if a row may have several labels

    def __post_init__(self) -> None:
        self._sets: list[tuple[int, ...]] | None = None
        self.keys = self.keys or self.classes
        self.numbers = self.numbers or range(len(self.classes))
        self._by_number = {number: i for i, number in enumerate(self.numbers)}
        # Of equal names, a whole line has precedence over a first name, and that over a synonym.
        names = [split_label(line) for line in self.keys]
        self._index = {name: i for i, synonyms in enumerate(names) for name in synonyms}
        self._index |= {synonyms[0]: i for i, synonyms in enumerate(names) if synonyms}
        self._index |= {line: i for i, line in enumerate(self.keys)}

    def labels_of(self, row: dict[str, Any]) -> tuple[int, ...]:
        """The numbers of all classes of a row, in the row's order, without repetition."""
        numbers = self._numbers(row[self.label_column])
        if not numbers:
            raise RAdapterError(
                f"image {self.name(row)} has no label in {self.label_column!r}; take it out, or"
                " give it a class such as 'none of them'"
            )
        return numbers

    def _numbers(self, value: Any) -> tuple[int, ...]:
        """The numbers of the classes in a value of the label column."""
        numbers: dict[int, None] = {}
        for label in split_labels(value, self.label_separator) if self.several else [value]:
            number = None
            try:
                if isinstance(label, str):
                    number = self._index.get(label)
                elif not isinstance(label, bool) and label == int(label):
                    number = self._by_number.get(int(label))
            except (TypeError, ValueError, OverflowError):
                pass
            if number is None:
                raise RAdapterError(
                    f"label {label!r} is none of the {len(self.classes)} classes"
                    f" ({', '.join(self.keys[:5])}, ...); name every class of"
                    f" {self.label_column!r} in the file given with --classes"
                )
            numbers[number] = None
        return tuple(numbers)

    def label_sets(self) -> list[tuple[int, ...]]:
        """The numbers of all classes of each row."""
        if self._sets is not None:
            return self._sets
        # Read only the column of labels, since reading images takes long.
        same: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal sets share one object
        numbers = map(self._numbers, self.rows[self.label_column])
        sets = [same.setdefault(labels, labels) for labels in numbers]
        if () in sets:
            self.labels_of(self.rows[sets.index(())])  # raises an error that names the image
        self._sets = sets
        return sets

    def labels(self) -> NDArray[np.int64]:
        """The number of each row's class, [N]; of several, the class with the fewest images."""
        sets = self.label_sets()
        if not self.several:
            return np.fromiter((labels[0] for labels in sets), np.int64, len(sets))
        counts = Counter(label for labels in sets for label in labels)
        rarest = (min(labels, key=lambda label: (counts[label], label)) for labels in sets)
        return np.fromiter(rarest, np.int64, len(sets))

    def held_out(self, fraction: float, seed: int) -> tuple[Labelled, Labelled]:
        """Split off a fraction of each class of two or more images, at least one and not all."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        labels = self.labels()[order]
        held = np.zeros(len(self.rows), bool)
        for number in range(len(self.classes)):
            images = order[labels == number]
            held[images[: share_of(len(images), fraction)]] = True
        if self.several:  # take back an image of each class whose images are all held out
            sets = self.label_sets()
            left = {label for number in np.flatnonzero(~held) for label in sets[number]}
            held[_bringing(sets, np.flatnonzero(held).tolist(), left)] = False
        kept, taken = (self.rows.select(np.flatnonzero(part)) for part in (~held, held))
        if not len(taken):
            raise RAdapterError(
                f"val_fraction is {fraction} but no class has two images; name validation data with"
                " --val-data, or hold out none with --val-fraction 0"
            )
        return dataclasses.replace(self, rows=kept), dataclasses.replace(self, rows=taken)

    def among(self, classes: Sequence[str], *, alone: bool = False) -> Labelled:
        """The same images with `classes` first, in their order; `alone` leaves out the others."""
        numbers: dict[str, list[int]] = {}
        for index, line in enumerate(self.classes):
            numbers.setdefault(line, []).append(index)
        order = [numbers[line].pop(0) if numbers.get(line) else None for line in classes]
        rest = [] if alone else sorted(index for indices in numbers.values() for index in indices)
        return self.of_classes(
            [*order, *rest], [*classes, *(self.classes[index] for index in rest)]
        )

    def of_classes(self, order: Sequence[int | None], classes: Sequence[str]) -> Labelled:
        """The images of some classes: their numbers in this data, None if new, and their names."""
        rows = self.rows
        if missing := set(range(len(self.classes))).difference(order):
            rows = rows.select(np.flatnonzero(~np.isin(self.labels(), list(missing))))
        if not len(rows):
            raise RAdapterError(
                f"the data has no image of the classes {', '.join(classes[:5])}; it has"
                f" {', '.join(self.classes[:5])}"
            )
        return dataclasses.replace(
            self,
            rows=rows,
            classes=list(classes),
            keys=[
                line if index is None else self.keys[index]
                for index, line in zip(order, classes, strict=True)
            ],
            numbers=[None if index is None else self.numbers[index] for index in order],
        )


def split_labels(value: Any, separator: str | None) -> list[Any]:
    """The labels in a value of the label column: a label, a list, None, or a text of labels."""
    if value is None:
        return []
    if isinstance(value, list | tuple | np.ndarray):
        return [label for part in value for label in split_labels(part, separator)]
    if isinstance(value, str) and separator is not None:
        return [part.strip() for part in value.split(separator) if part.strip()]
    return [value]


def class_split(data: Labelled, split: str) -> Labelled:
    """The base or the novel half of the classes and their images, as in CoOp."""
    if split == "all":
        return data
    if data.several:
        raise RAdapterError(
            f"class_split {split} needs one label an image, and this data may have several"
        )
    count = len(data.classes)
    middle = (count + 1) // 2
    chosen = range(middle) if split == "base" else range(middle, count)
    if not chosen:
        raise RAdapterError(f"class_split {split} of {count} class leaves none")
    return data.of_classes(chosen, [data.classes[number] for number in chosen])


def few_shot(data: Labelled, shots: int, seed: int) -> Labelled:
    """Draw a few images of each class with the seed, as in CoOp; more shots
    include those of fewer.
    """
    order = np.random.default_rng(seed).permutation(len(data.rows))
    labels = data.labels()[order]
    chosen = [
        order[np.flatnonzero(labels == number)[:shots]] for number in range(len(data.classes))
    ]
    if data.several:  # the first image of each class without an image after one shot
        sets = data.label_sets()
        one_shot = np.concatenate([images[:1] for images in chosen])
        present = {label for number in one_shot for label in sets[number]}
        chosen.append(np.array(_bringing(sets, order.tolist(), present), np.int64))
    return dataclasses.replace(data, rows=data.rows.select(np.unique(np.concatenate(chosen))))


def _bringing(
    sets: Sequence[tuple[int, ...]], numbers: Iterable[int], present: set[int]
) -> list[int]:
    """Images that add a class not yet in `present`, which is updated."""
    images = []
    for number in numbers:
        if not present.issuperset(sets[number]):
            images.append(number)
            present.update(sets[number])
    return images


def load_labelled(source: DataSource, *, every_class: bool = True) -> Labelled:
    """Open images with labels; `every_class` refuses classes without images, for training."""
    # Open the rows, and find the names of their classes.
    spec = source.data
    label_column = source.label_column
    label_separator = source.label_separator
    flags = {source.image_column: "--image-column", label_column: "--label-column"}
    opened = open_rows(spec, flags)
    rows = opened.table
    feature: Any = (rows.features or {}).get(label_column)
    lists = isinstance(feature, datasets.List | datasets.LargeList)
    if lists:
        feature = feature.feature
    several = lists or label_separator is not None
    keys = getattr(feature, "names", None)
    by_name = keys is None
    if by_name and "string" in getattr(feature, "dtype", ""):
        values = rows[label_column]
        if several:
            values = (label for value in values for label in split_labels(value, label_separator))
        keys = sorted({value for value in values if value is not None})
    if opened.class_folders and keys is not None:
        empty = sorted(sub_folders(opened.folder) - set(keys))
        if empty and every_class:
            raise RAdapterError(
                f"{len(empty)} class folders of {spec} hold no image:"
                f" {some([repr(name) for name in empty])}; add some or remove the folders; images"
                f" are {', '.join(SUFFIXES)}"
            )
        keys = [*keys, *empty]

    # Choose names for prompts.
    keys, names = prompt_names(
        keys,
        source.classes,
        spec,
        by_name=by_name,
        every_class=every_class,
        whole=opened.class_folders,
    )
    data = Labelled(
        rows,
        names,
        source.image_column,
        label_column,
        source.images or opened.folder,
        keys=keys,
        exif_orientation=source.exif_orientation,
        left_out=opened.left_out,
        label_separator=label_separator,
        several=several,
    )

    # Check that every label is of a class, and in training that every class has an image.
    if len(rows) == 0:
        raise RAdapterError(f"{spec} holds no images")
    present = {label for labels in data.label_sets() for label in labels}
    missing = [name for index, name in enumerate(names) if index not in present]
    if missing and every_class:
        raise RAdapterError(
            f"{len(missing)} of {len(names)} classes have no image in {spec}:"
            f" {some([repr(name) for name in missing])}; add images or take them out of the class"
            " file"
        )
    return data


def imagenet_classes() -> dict[str, str]:
    """CLIP's name of each class of ImageNet, by WordNet id, and by number as text."""
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    names = open_clip.IMAGENET_CLASSNAMES
    ids = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    return {
        **dict(zip(ids, names, strict=True)),
        **{str(index): name for index, name in enumerate(names)},
    }


def refuse_wordnet_ids(names: Sequence[str]) -> None:
    """Refuse names that are all WordNet ids: CLIP can't read a prompt with "n01440764" in it."""
    if names and all(_WORDNET_ID.fullmatch(name) for name in names):
        raise RAdapterError(
            f"the names of the classes are WordNet ids ({', '.join(names[:3])}, ...), which CLIP"
            f" can't read; give CLIP's names with --classes {IMAGENET}, or a file with lines"
            f" such as '{names[0]}: tench'"
        )


def prompt_names(
    keys: Sequence[str] | None,
    classes: Path | None,
    spec: str,
    *,
    by_name: bool,
    every_class: bool = True,
    whole: bool = False,
) -> tuple[list[str], list[str]]:
    """The key of each class in the data, in the order of the labels, and its name for prompts.
    These are names in the class file `classes`, CLIP's for `imagenet`, or by default the keys; with
    `whole`, a comma in a key separates no synonyms.
    """
    if classes is None:
        if keys is None:
            raise RAdapterError(
                f"{spec} does not name its classes; give a file with one class a line: --classes"
                " FILE"
            )
        names = [key.replace("_", " ") for key in keys]
        if whole:
            names = [join_label([name]) for name in names]
    elif str(classes) == IMAGENET:
        keys, names = _of_imagenet(keys, spec)
    elif keys is None or by_name:
        lines = _read(classes, keys or ())
        keys = [key or line for key, line in lines]
        names = [line for _, line in lines]
        numbers = [str(index) for index in range(len(keys))]
        if all(key.isdecimal() for key in keys) and keys != numbers:
            raise RAdapterError(
                f"the class file {classes} must number its lines from 0 on, in order"
            )
    else:
        folders = set(keys) if whole else set()
        keys, names = _matched(keys, _read(classes, keys), classes, spec, every_class)
        names = [  # a line equal to a folder's name has no synonyms
            join_label([line]) if line == key and key in folders else line
            for key, line in zip(keys, names, strict=True)
        ]
    for key, line in zip(keys, names, strict=True):
        if not split_label(line):
            raise RAdapterError(
                f"the class {key!r} of {spec} has no name for a prompt; rename it, or see --classes"
            )
    return list(keys), names


def _of_imagenet(keys: Sequence[str] | None, spec: str) -> tuple[Sequence[str], list[str]]:
    from timm.data.imagenet_info import ImageNetInfo

    known = imagenet_classes()
    ids = list(known)[:1000]
    if keys is None:
        return ids, [known[id_] for id_ in ids]
    # Keys may be WordNet's names of the 1,000 classes in order; some data spell a few differently.
    words = ImageNetInfo("imagenet-1k").label_descriptions()  # type: ignore[no-untyped-call]
    same = [set(split_label(a)) & set(split_label(b)) for a, b in zip(keys, words, strict=False)]
    if len(keys) == len(words) and sum(map(bool, same)) >= 900:
        return keys, [known[id_] for id_ in ids]
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise RAdapterError(
            f"{spec} has the class {unknown[0]!r} ({len(unknown)} such of {len(keys)}), which is no"
            f" class of ImageNet; --classes {IMAGENET} knows WordNet ids such as n01440764 and the"
            " numbers 0 to 999; for other data give a class file, or --classes none"
        )
    return keys, [known[key] for key in keys]


def _read(path: Path, keys: Sequence[str]) -> list[tuple[str | None, str]]:
    """Read a class file as pairs of key, which is before a colon or None, and name."""
    lines: list[tuple[str | None, str]] = []
    for line in read_label_file(path):
        key, colon, name = line.partition(": ")
        plain = not colon or not split_label(name) or line in keys
        if plain or not set(split_label(line)).isdisjoint(keys):
            lines.append((None, line))
        else:
            lines.append((key.strip(), name.strip()))
    return lines


def _matched(
    keys: Sequence[str],
    lines: Sequence[tuple[str | None, str]],
    path: Path,
    spec: str,
    every_class: bool,
) -> tuple[list[str], list[str]]:
    """Match keys with the lines of a class file; returns keys and names, unused lines last."""

    def plain(name: str) -> str:
        return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())

    # Of equal names, a whole line has precedence over a first name, and that over a synonym.
    index: dict[str, int] = {}
    for kind in (split_label, lambda line: split_label(line)[:1], lambda line: [line]):
        for number, (key, line) in enumerate(lines):
            index |= {plain(name): number for name in ([key] if key else kind(line))}
    index |= {key: number for number, (key, _) in enumerate(lines) if key}
    numbers = [index.get(key, index.get(plain(key), -1)) for key in keys]
    without = [key for key, number in zip(keys, numbers, strict=True) if number < 0]
    rest = [number for number in range(len(lines)) if number not in numbers]
    unused = [lines[number][0] or lines[number][1] for number in rest]
    if without or (unused and every_class) or len(set(numbers)) < len(numbers):
        raise RAdapterError(
            f"the class file {path} does not match the {len(keys)} classes of {spec}: without a"
            f" line: {some(without)}; without a class: {some(unused)}; write one line for each"
            f" class, such as '{(without or list(keys))[0]}: name for prompts'"
        )
    return [*keys, *unused], [lines[number][1] for number in (*numbers, *rest)]


def some(names: Sequence[str]) -> str:
    """Up to five names for a message, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "none"
