"""Segments of images with masks: each pair is the crop of a segment and a prompt with its class's name."""

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

from radapter_serve.data.masks import ClassMask, Masked, MaskedImage
from radapter_serve.data.rows import BrokenImage, LabelledImages, decode_named
from radapter_serve.errors import RAdapterError
from radapter_serve.inputs.mask_crop import MaskCrop


@dataclass
class SegmentCrops(LabelledImages):
    """Data for training and validation of which each row is one segment of an image.

    Attributes:
        rows: int32 [N, 3]: number of the image, of its segment, and of the segment's class.
        images: with masks.
        classes: one entry a class, synonyms after commas.
        crop: what the encoder sees of a segment.
        templates: prompt templates with `{}`, of which a training pair draws one.
    """

    rows: NDArray[np.int32]
    images: Sequence[MaskedImage]
    classes: list[str]
    crop: MaskCrop
    templates: Sequence[str]
    _last: tuple[int, Image.Image, list[ClassMask]] | None = field(default=None, init=False, repr=False)

    def label(self, row: Any) -> int:
        """The number of a segment's class."""
        return int(row[2])

    def image(self, row: Any) -> Image.Image:
        """The crop of a segment.

        Raises:
            BrokenImage: the image is missing, or no image; says which.
            RAdapterError: the mask can't be read.
        """
        number, segment = int(row[0]), int(row[1])
        if self._last is None or self._last[0] != number:  # in their order, as in validation, each is decoded once
            masked = self.images[number]
            image = decode_named(masked.data(), masked.path, exif_orientation=masked.exif_orientation)
            self._last = number, image, masked.segments()
        _, image, segments = self._last
        return self.crop(image, segments[segment][1])


def load_segments(
    masked: Masked, crop: MaskCrop, *, min_area: int, templates: Sequence[str], broken: list[str] | None = None
) -> SegmentCrops:
    """List the segments of a data set; reads every mask once, and shows how far it is.

    Args:
        masked: as `load_masked` gives it.
        crop: what the encoder sees of a segment.
        min_area: pixels below which a segment is left out.
        templates: prompt templates with `{}`.
        broken: takes the names of images that can't be read, which are then left out; None raises BrokenImage.

    Raises:
        RAdapterError: a mask can't be read or does not fit its image, or no segment is left.
    """
    rows, largest = [], 0
    console = Console(quiet=os.environ.get("LOCAL_RANK", "0") != "0")  # of several processes, one tells
    if not console.is_terminal:
        console.print(f"reading the masks of {len(masked.images)} images", highlight=False)
    bar = track(masked.images, "reading masks", console=console, transient=True, disable=not console.is_terminal)
    for number, image in enumerate(bar):
        try:
            areas = image.areas()
        except BrokenImage as error:
            if broken is None:
                raise
            broken.append(str(error))
            continue
        rows += [(number, segment, label) for segment, (label, area) in enumerate(areas) if area >= min_area]
        largest = max([largest, *(area for _, area in areas)])
    if not rows and largest:
        raise RAdapterError(f"no segment has {min_area} pixels, the largest {largest}; lower --mask-min-area")
    if not rows:
        raise RAdapterError(
            f"the masks of {len(masked.images)} images hold no pixel of a class that is named "
            f"({', '.join(masked.classes[:5])}, ...); check the ids in the class file"
        )
    return SegmentCrops(np.array(rows, np.int32), masked.images, masked.classes, crop, templates)
