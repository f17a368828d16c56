"""Inputs by which the ranges of int8's activations are found: images and texts of the user's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_export.quantization import Batches
from radapter_export.references import Inputs
from radapter_export.source import Source
from radapter_serve.clip.base import Base
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.image_files import spread
from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.data.image_files import Images
from radapter_serve.errors import RAdapterError

IMAGES = 128  # of those given, evenly spread; more hardly move the ranges
PROMPTS = 512  # likewise, of label sets
_IMAGES_A_BATCH = 8
_TEXTS_A_BATCH = 64


@dataclass(frozen=True)
class Calibration:
    """Inputs by which the ranges of activations are found.

    Attributes:
        images: uint8 [B, S, S, 3] each, as served.
        tokens: int32 [B, L] each.
    """

    images: Batches
    tokens: Batches

    def of(self, graph: str) -> Batches:
        """The batches for a graph, by its name."""
        return self.tokens if graph == "text_encoder" else self.images

    def facts(self) -> dict[str, Any]:
        """What decides the ranges, for a release."""
        digest = hashlib.sha256()
        for batch in (*self.images, *self.tokens):
            digest.update(np.ascontiguousarray(batch).data)
        counts = {"images": sum(map(len, self.images)), "texts": sum(map(len, self.tokens))}
        return {**counts, "digest": f"sha256:{digest.hexdigest()}"}


def calibrate(images: Images, base: Base, source: Source, tokenizer: Tokenizer) -> Calibration:
    """Take some of the images, some prompts of the label sets, and texts that agreement is not
    checked with.

    Args:
        images: of the user's.
        base: gives size and preprocessing.
        source: gives label sets and prompt templates.
        tokenizer: as it is served.

    Raises:
        RAdapterError: an image can't be read; says which.
    """
    turns = {"exif_orientation": source.exif_orientation}
    preprocess = Preprocess.from_dict({**base.preprocess, **turns})
    prompts = [
        template.replace("{}", name)
        for labels in source.label_sets.values()
        for label in labels
        for name in split_label(label)
        for template in source.templates
    ]
    some = spread(prompts, PROMPTS)
    texts = [
        tokenizer(some[start : start + _TEXTS_A_BATCH])
        for start in range(0, len(some), _TEXTS_A_BATCH)
    ]
    unseen = Inputs(base, tokenizer, base.image_size, seed=1)
    return Calibration(calibration_images(images, preprocess), [*unseen.tokens, *texts])


def calibration_images(images: Images, preprocess: Preprocess) -> list[NDArray[np.uint8]]:
    """Some of the images in batches, prepared as the server prepares them.

    Raises:
        RAdapterError: an image can't be read; says which.
    """
    pixels = []
    for row in spread(images.rows, IMAGES):
        try:
            pixels.append(decode_pixels(images.data(row), preprocess))
        except TaskError as error:
            raise RAdapterError(
                f"calibration image {images.name(row)} can't be read: {error.what}"
            ) from error
        except RAdapterError as error:
            raise RAdapterError(f"calibration: {error}") from error
    return [
        np.stack(pixels[start : start + _IMAGES_A_BATCH])
        for start in range(0, len(pixels), _IMAGES_A_BATCH)
    ]
