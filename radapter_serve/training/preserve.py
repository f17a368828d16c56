"""How far a model in training is from its base, which `preserve` adds to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import parametrize

from radapter_serve.adapter import Adapters
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image
from radapter_serve.training.loss import distance_to_base


@contextmanager
def at_base(adapters: Adapters, accelerator: Accelerator) -> Iterator[None]:
    """Within the block the model in training is its base, and nothing has gradients. No second
    model is in memory.
    """
    adapters.alpha = 0.0
    try:
        # A cache of its own: the weights that training caches have the adapters in them.
        with torch.no_grad(), accelerator.autocast(), parametrize.cached():
            yield
    finally:
        adapters.alpha = 1.0


def distance_of_images(
    base: Base, adapters: Adapters, accelerator: Accelerator, pixels: Tensor, image_embeds: Tensor
) -> Tensor:
    """How far the images of a batch are from where the base has them, as `distance_to_base`.

    Args:
        base: with the adapters attached.
        adapters: in training.
        accelerator: of the run.
        pixels: of this process, [B, 3, S, S].
        image_embeds: what the model gives for the pixels of all processes, float [B·world, D], unit
            length.

    Returns:
        A float32 scalar.
    """
    with at_base(adapters, accelerator):
        base_embeds = encode_image(base.model, pixels)
    return distance_to_base(image_embeds, accelerator.gather(base_embeds))
