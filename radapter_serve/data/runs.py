"""The data of a run, opened so that training and later evaluation see the same validation data;
checks of the data before a model is loaded; and the digest of held-out images in an adapter file.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import spread, verify
from radapter_serve.contract.labels import split_label
from radapter_serve.data.captions import Captioned, load_captioned
from radapter_serve.data.labelled import (
    Labelled,
    class_split,
    load_labelled,
    refuse_wordnet_ids,
)
from radapter_serve.data.masks import Masked, SegmentCrops, load_masked
from radapter_serve.data.rows import BrokenImage, image_source, tracked
from radapter_serve.data.source import DataSource, RunSource
from radapter_serve.errors import RAdapterError
from radapter_serve.process import decoders

Images = Labelled | Captioned | Masked
_MAX_DECODED = 10_000  # images of a data set, evenly spaced
_BLOCK = 1000  # paths that a thread checks at a time


def open_source(
    source: DataSource,
    *,
    captions_per_image: int = 1,
    every_class: bool = False,
    broken: list[str] | None = None,
) -> Images:
    """Open data for its task; the arguments are those of `load_captioned` and `load_labelled`."""
    if source.task == "segmentation":
        return load_masked(source)
    if source.task == "retrieval":
        return load_captioned(source, captions_per_image=captions_per_image, broken=broken)
    return load_labelled(source, every_class=every_class)


def run_data(source: RunSource, broken: list[str] | None = None) -> tuple[Images, Images | None]:
    """Open the training data of a run, and the share that is held out, or None."""
    data = open_source(
        source,
        captions_per_image=source.captions_per_image,
        every_class=True,
        broken=broken if source.on_broken == "skip" else None,
    )
    if isinstance(data, Labelled):
        if source.classes is None:
            refuse_wordnet_ids(data.keys)
        data = class_split(data, source.class_split)
    if not source.val_fraction:
        return data, None
    return data.held_out(source.val_fraction, source.seed)


def validation_data(
    source: RunSource, classes: Sequence[str] | None = None, broken: list[str] | None = None
) -> Images | None:
    """Open the validation data of a run, if it has any: `val_data`, or the share that training held
    out. Images are classified among all `classes` of the run, else of the data.
    """
    if source.val_data:
        skipped = broken if source.on_broken == "skip" else None
        val: Images | None = open_source(
            dataclasses.replace(source, data=source.val_data), broken=skipped
        )
        if isinstance(val, Labelled) and source.classes is None:
            refuse_wordnet_ids(val.keys)
    else:
        val = run_data(source, broken)[1]
    if isinstance(val, Labelled) and classes is not None:
        return val.among(classes, alone=source.class_split != "all")
    if isinstance(val, Masked) and classes is not None:
        place = source.val_data or source.data
        for entries, others, has, lacks in (
            (val.classes, classes, place, "the run"),
            (classes, val.classes, "the run", place),
        ):
            if more := [entry for entry in entries if entry not in others]:
                raise RAdapterError(
                    f"{has} has the class {more[0]!r}, which {lacks} has not ({len(more)} of"
                    f" {len(entries)}); name one class file for both, with --classes FILE"
                )
    return val


def broken_images(data: Images, *, progress: bool = True) -> list[str]:
    """Find images that are missing or, among `_MAX_DECODED`, can't be decoded; a line for each."""
    rows: Any
    if isinstance(data, Masked):
        rows = data.images
    else:
        rows = data.image_rows.select_columns([data.image_column])

    def missing(start: int) -> dict[int, str]:
        """Missing files among a block of rows; none if the table holds the bytes."""
        block = slice(start, start + _BLOCK)
        if isinstance(data, Masked):
            paths = [image.path for image in rows[block]]
        elif "string" in getattr(rows.features[data.image_column], "dtype", ""):
            paths = [data.folder / (value or "") for value in rows[block][data.image_column]]
        else:
            return {}
        return {
            number: f"image {path} can't be read: {os.strerror(errno.ENOENT)}"
            for number, path in enumerate(paths, start)
            if not path.is_file()
        }

    def problem(number: int) -> str:
        """The reason why an image can't be read; empty if it can."""
        row = rows[number]
        try:
            verify(row.data() if isinstance(data, Masked) else data.data(row))
        except BrokenImage as error:
            return str(error)
        except TaskError as error:
            name = row.path if isinstance(data, Masked) else data.name(row)
            return f"image {name} can't be read: {error.what}"
        return ""

    # Look for all images, and decode some.
    count = len(rows)
    chosen = spread(range(count), _MAX_DECODED)
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(decoders(16)) as pool:
        if count > len(chosen):
            for block in pool.map(missing, range(0, count, _BLOCK)):
                broken |= block
        lines = pool.map(problem, chosen)
        for number, line in zip(
            chosen, tracked(lines, len(chosen), "checking", progress), strict=True
        ):
            if line:
                broken[number] = line
    return [broken[number] for number in sorted(broken)]


def equal_names(data: Labelled | Masked) -> list[str]:
    """Classes whose names are equal for CLIP: they differ only in case, spaces and underscores."""
    names = data.keys if isinstance(data, Labelled) else data.classes
    same: dict[str, list[str]] = {}
    for name, line in zip(names, data.classes, strict=True):
        plain = " ".join(split_label(line)[0].casefold().replace("_", " ").split())
        same.setdefault(plain, []).append(name)
    return [" and ".join(map(repr, equal)) for equal in same.values() if len(equal) > 1]


class OtherImages(RAdapterError):
    """The held-out images differ from those that training held out."""


def held_out_digest(data: Images | SegmentCrops) -> str:
    """The `sha256:` digest of the paths of images below their common folder, which may move."""
    values: Iterable[Any]
    if isinstance(data, Labelled | Captioned):
        column = data.image_column
        values = (row[column] for row in data.image_rows.select_columns([column]))
    else:
        values = (str(image.path) for image in data.images)
    paths = []
    for value in values:
        source = image_source(value)
        name = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else source
        paths.append(Path(name).absolute())
    folder = os.path.commonpath([path.parent for path in paths])
    lines = sorted(f"{path.relative_to(folder).as_posix()}\n" for path in paths)
    return f"sha256:{hashlib.sha256(''.join(lines).encode(errors='surrogateescape')).hexdigest()}"


def check_held_out(data: Images, digest: str, place: str) -> None:
    """Refuse images that differ from those that training held out."""
    if held_out_digest(data) != digest:
        raise OtherImages(
            f"{place} has changed since training: the share that val_fraction draws now holds"
            " images that the run was trained with. Bring back the files as they were, or name"
            " other validation data: sets with `split: validation` in a suite for radapter-eval,"
            " --validation DATA or none for radapter-export"
        )
