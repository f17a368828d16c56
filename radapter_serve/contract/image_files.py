"""Which files are images, by their names: one list for training, evaluation, indexes and
calibration.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from radapter_serve.errors import RAdapterError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of the formats that `preprocess.decode` reads

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder."""

    images: list[Path]  # folder by folder, in the order of their names
    left_out: dict[str, int]  # number of files of other kinds, by the end of their names


def is_image_file(name: str) -> bool:
    """Whether a file's name ends as that of an image that is read."""
    return name.lower().endswith(SUFFIXES)


def list_images(folder: Path) -> ImageFiles:
    """List the images in a folder and in all folders in it; hidden ones are left out, links are
    followed once.
    """

    def refuse(error: OSError) -> None:  # or its images would be missing in silence
        raise RAdapterError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    images = []
    left_out: Counter[str] = Counter()
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # A link to a folder above would have no end.
        entered = []
        for name in sorted(folders):
            real = os.path.realpath(Path(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        for name in sorted(files):
            file = Path(place, name)
            if is_image_file(name) and not name.startswith("."):
                images.append(file)
            elif not name.startswith("."):
                left_out[file.suffix.lower()] += 1
    return ImageFiles(images, dict(left_out))


def count_kinds(left_out: Mapping[str, int]) -> str:
    """Files by kind in words, the most frequent first: "3 .gif, 1 .txt"."""
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    return ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in kinds)


def spread(items: Sequence[T], max_count: int) -> list[T]:
    """So many of them at most, evenly spread."""
    count = min(len(items), max_count)
    return [items[number * len(items) // count] for number in range(count)]
