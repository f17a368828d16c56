"""Segments of images with masks: each pair is the crop of a segment and a prompt with its class's
name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.masks import ClassMask, Masked, MaskedImage
from radapter_serve.data.rows import BrokenImage, LabelledImages, decode_named
from radapter_serve.errors import RAdapterError, listed


@dataclass
class SegmentCrops(LabelledImages):
    """Data for training and validation of which each row is one segment of an image."""

    rows: NDArray[np.int32]  # [N, 3]: number of the image, of its segment, and of the class
    images: Sequence[MaskedImage]
    classes: list[str]
    crop: MaskCrop = field(default_factory=MaskCrop)  # what the encoder sees of a segment
    templates: Sequence[str] = ("a photo of a {}.",)
    _last: tuple[int, Image.Image, list[ClassMask]] | None = field(
        default=None, init=False, repr=False
    )

    def labels_of(self, row: Any) -> tuple[int, ...]:
        """The number of a segment's class."""
        return (int(row[2]),)

    def image(self, row: Any) -> Image.Image:
        """The crop of a segment."""
        number = int(row[0])
        segment = int(row[1])
        # In their order, as in validation, each image is decoded once.
        if self._last is None or self._last[0] != number:
            masked = self.images[number]
            image = decode_named(
                masked.data(), masked.path, exif_orientation=masked.exif_orientation
            )
            self._last = number, image, masked.segments()
        _, image, segments = self._last
        return self.crop(image, segments[segment][1])


def list_segments(
    masked: Masked, min_area: int, broken: list[str] | None = None, *, progress: bool = True
) -> SegmentCrops:
    """List the segments of a data set; reads every mask once."""
    rows: list[tuple[int, int, int]] = []
    wrong: list[str] = []
    largest = 0
    progress = progress and os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, one
    console = Console(quiet=not progress)
    if not console.is_terminal:
        console.print(f"reading the masks of {len(masked.images)} images", highlight=False)
    bar = track(
        masked.images,
        "reading masks",
        console=console,
        transient=True,
        disable=not (progress and console.is_terminal),
    )
    for number, image in enumerate(bar):
        try:
            areas = image.areas()
        except RAdapterError as error:
            left_out = wrong if broken is None or not isinstance(error, BrokenImage) else broken
            left_out.append(str(error))
            continue
        rows += [
            (number, segment, label)
            for segment, (label, area) in enumerate(areas)
            if area >= min_area
        ]
        largest = max([largest, *(area for _, area in areas)])
    if len(wrong) == 1:
        raise RAdapterError(wrong[0])
    if wrong:
        raise RAdapterError(
            f"{len(wrong)} of {len(masked.images)} images can't be used with their"
            f" masks:{listed(wrong)}"
        )
    if not rows and largest:
        raise RAdapterError(
            f"no segment has {min_area} pixels, the largest {largest}; lower --mask-min-area"
        )
    if not rows:
        raise RAdapterError(
            f"the masks of {len(masked.images)} images hold no pixel of a class that is named "
            f"({', '.join(masked.classes[:5])}, ...); check the ids in the class file"
        )
    return SegmentCrops(np.array(rows, np.int32), masked.images, masked.classes)
