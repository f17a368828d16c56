"""Which images a run held out, as a digest by which its adapter file knows them again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import Labelled
from radapter_serve.data.masks import Masked
from radapter_serve.data.rows import image_source
from radapter_serve.data.segments import SegmentCrops
from radapter_serve.errors import RAdapterError


class OtherImages(RAdapterError):
    """The images that are held out now are not those that training held out."""


def held_out_digest(data: Labelled | Captioned | Masked | SegmentCrops) -> str:
    """`sha256:` over the names of images: paths below the folder that holds them all, so that it
    may move.
    """
    paths = [Path(_name(value)).absolute() for value in _values(data)]
    folder = os.path.commonpath([path.parent for path in paths])
    lines = sorted(f"{path.relative_to(folder).as_posix()}\n" for path in paths)
    return f"sha256:{hashlib.sha256(''.join(lines).encode(errors='surrogateescape')).hexdigest()}"


def check_held_out(data: Labelled | Captioned | Masked, digest: str, place: str) -> None:
    """Refuse images that are not those that training held out."""
    if held_out_digest(data) != digest:
        raise OtherImages(
            f"{place} has changed since training: the share that val_fraction draws now holds"
            " images that the run was trained with. Bring back the files as they were, or name"
            " other validation data: sets with `split: validation` in a suite for radapter-eval,"
            " --validation DATA or none for radapter-export"
        )


def _values(data: Labelled | Captioned | Masked | SegmentCrops) -> Iterable[Any]:
    if isinstance(data, Labelled):
        return (row[data.image_column] for row in data.rows.select_columns([data.image_column]))
    if isinstance(data, Captioned):
        return (data.table[image.row][data.image_column] for image in data.images)
    return (str(image.path) for image in data.images)


def _name(value: Any) -> str:
    source = image_source(value)
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else source
