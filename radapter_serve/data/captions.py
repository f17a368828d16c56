"""Images with captions: each pair is an image and one or several of its captions."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from radapter_serve.data.rows import ImageColumn, check_share, image_source, open_rows
from radapter_serve.data.source import DataSource
from radapter_serve.errors import RAdapterError

_BLOCK = 1000  # rows in memory at once


@dataclass(frozen=True)
class CaptionedImage:
    """One image: the number of its first row, and its captions from all rows."""

    row: int
    captions: tuple[str, ...]


@dataclass
class Captioned(ImageColumn):
    """Images with captions; rows with the same path or bytes are one image, its
    number the label.
    """

    table: Any  # a Hugging Face data set with a caption or a list of captions in each row
    images: Sequence[CaptionedImage]  # each image of the table once
    image_column: str
    folder: Path = field(default_factory=Path)  # relative image paths start here
    captions_per_image: int = 1  # texts of a training pair
    exif_orientation: bool = True

    @cached_property
    def rows(self) -> Any:
        """Rows for training: one for each caption or, with several captions a pair, each image."""
        numbered = list(enumerate(image.captions for image in self.images))
        if self.captions_per_image > 1:
            return numbered
        return [(number, (caption,)) for number, captions in numbered for caption in captions]

    @property
    def image_rows(self) -> Any:
        """The first row of each image."""
        return self.table.select([image.row for image in self.images])

    def pair(self, row: Any, draw: random.Random) -> tuple[Image.Image, int, str | list[str]]:
        """The image, its number, and randomly drawn captions, repeated if there are too few."""
        count = self.captions_per_image
        label, captions = row
        image = self.image(self.table[self.images[label].row])
        texts = draw.sample(captions, len(captions))
        if count == 1:
            return image, label, texts[0]
        return image, label, [texts[index % len(texts)] for index in range(count)]

    def held_out(self, fraction: float, seed: int) -> tuple[Captioned, Captioned]:
        """Split off a fraction of the images, drawn with the seed, with their captions."""
        images = random.Random(seed).sample(list(self.images), len(self.images))
        count = check_share(len(images), fraction)
        kept = dataclasses.replace(self, images=images[count:])
        return kept, dataclasses.replace(self, images=images[:count], captions_per_image=1)


def load_captioned(
    source: DataSource, *, captions_per_image: int = 1, broken: list[str] | None = None
) -> Captioned:
    """Open images with captions; `broken` collects rows without one, which else are errors."""
    spec = source.data
    image_column = source.image_column
    caption_column = source.caption_column
    columns = {image_column: "--image-column", caption_column: "--caption-column"}
    rows = open_rows(spec, columns)
    table = rows.table

    # Gather the captions of each image, block by block: a table may be larger than memory.
    first: dict[str, int] = {}
    captions_of: dict[str, list[str]] = {}
    number = -1
    for block in table.select_columns(list(columns)).iter(_BLOCK):
        for image, value in zip(block[image_column], block[caption_column], strict=True):
            number += 1
            captions = list(value) if isinstance(value, (list, tuple)) else [value]
            if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
                line = f"row {number + 1} of {spec} has no text in {caption_column!r}: {value!r}"
                if broken is None:
                    raise RAdapterError(
                        f"{line}; mend it, or leave such rows out with --on-broken skip"
                    )
                broken.append(line)
                continue
            content = image_source(image)  # the same bytes, or the same path, are the same image
            encoded = content if isinstance(content, bytes) else content.encode()
            key = hashlib.sha256(encoded).hexdigest()
            first.setdefault(key, number)
            captions_of.setdefault(key, []).extend(captions)
    images = [CaptionedImage(first[key], tuple(texts)) for key, texts in captions_of.items()]
    most = max((len(image.captions) for image in images), default=0)
    if not most:
        raise RAdapterError(f"{spec} holds no images with captions")
    if most < captions_per_image:
        raise RAdapterError(
            f"captions_per_image is {captions_per_image} but no image of {spec} has more than"
            f" {most}"
        )
    return Captioned(
        table,
        images,
        image_column,
        source.images or rows.folder,
        captions_per_image,
        source.exif_orientation,
    )
