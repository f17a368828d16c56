"""Batches of images for evaluation, as open_clip's own transform makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from radapter_serve.clip.base import Base
from radapter_serve.data import BrokenImage


def evaluation_batches(
    base: Base,
    rows: Sequence[Any],
    read: Callable[[Any], tuple[Image.Image, int | NDArray[np.bool_]]],
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
        read: the image of a row and its label, or of every class whether it is one of its labels.
        batch_size: images a batch.
        rank, world: number of this process and of all; each gets its share.
        broken: takes the names of images that can't be read, which are then left out; None raises
            BrokenImage.
    """
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    mine = range(rank, len(rows), world)
    for first in range(0, len(mine), batch_size):
        pixels = []
        labels = []
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
            yield torch.stack(pixels), torch.from_numpy(np.array(labels))  # type: ignore[arg-type]
