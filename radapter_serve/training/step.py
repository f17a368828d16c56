"""The parts of a training step: both towers, the average of the adapters (Eq. 8), prompts of
classes that a batch lacks, and a look at the base.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import open_clip
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radapter_serve.adapter import Adapters
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.contract.labels import split_label
from radapter_serve.data.rows import LabelledImages


class TwoTower(nn.Module):
    """Both towers in one forward pass, which is what data parallelism wraps."""

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds pixels [B, 3, S, S] and tokens [B, L], both to float32 [B, D] of unit length."""
        with parametrize.cached():  # attention reads its weights more than once
            return encode_image(self.model, pixels), encode_text(self.model, tokens)


class Average:
    """`W̃ ← m·W̃ + (1−m)·W` after every step, in fp32, from the adapters' start.

    Args:
        adapters: whose tensors are averaged.
        momentum: m in [0, 1).
        bias_correction: divide out the weight that the start still has, `1−m^t`. The paper has
            none, and with m = 0.999 a run of a few hundred steps then keeps almost nothing of what
            was learned.
    """

    def __init__(
        self, adapters: Adapters, momentum: float, *, bias_correction: bool = False
    ) -> None:
        self.adapters = adapters
        self.momentum = momentum
        self.bias_correction = bias_correction
        self.steps = 0
        self.tensors = {
            name: p.detach().float().clone() for name, p in adapters.named_tensors().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the adapters' present values; call it after every optimizer step."""
        self.steps += 1
        share = self.share()
        for name, value in self.adapters.named_tensors().items():
            self.tensors[name].lerp_(value.float(), share)

    def share(self) -> float:
        """The share of the newest values in the average, from 0 to 1."""
        m = self.momentum
        if self.bias_correction:  # the same as W̃/(1−m^t) of an average that starts at zero
            m = m * (1 - m ** (self.steps - 1)) / (1 - m**self.steps)
        return 1 - m

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the adapters hold the average and drop nothing."""
        kept = {name: p.detach().clone() for name, p in self.adapters.named_tensors().items()}
        self.adapters.stop_drop()
        self.adapters.load_tensors(self.tensors)
        try:
            yield
        finally:
            self.adapters.load_tensors(kept)

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a checkpoint."""
        self.steps = steps
        for name, value in tensors.items():
            self.tensors[name].copy_(value)


def flatten_projections(model: nn.Module) -> None:
    """Make the in-projection of each `nn.MultiheadAttention` a product of two matrices.

    With `batch_first`, torch transposes its input [N, L, D] into a view [L, N, D], which it then
    multiplies as a batch of L matrices by L copies of the weight: in bf16 that took half of a step.
    A contiguous [L, N, D] is multiplied as one matrix [L·N, D]; the values are the same.
    """

    def contiguous(attention: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        query = args[0]
        if query.dim() != 3 or any(other is not query for other in args[1:3]):
            return None  # of cross-attention
        rows = query.transpose(0, 1).contiguous().transpose(0, 1)
        return (rows, rows, rows, *args[3:])

    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.batch_first:
            module.register_forward_pre_hook(contiguous)


def other_prompts(
    data: LabelledImages, present: Collection[int], count: int, draw: random.Random
) -> dict[int, str]:
    """Drawn prompts of at most so many classes that no image of a batch has, by their numbers.

    A class that has the first name of one in the batch is left out: its prompt would be right.
    """
    names = [split_label(line)[0] for line in data.classes]
    taken = {names[label] for label in present if 0 <= label < len(names)}
    absent = [label for label, name in enumerate(names) if name not in taken]
    drawn = draw.sample(absent, min(count, len(absent)))
    return {label: data.prompt(label, draw) for label in drawn}


def share(texts: Sequence[str], process: int, processes: int) -> list[str]:
    """One process's part of texts; the first text fills up the last parts, so all are as long."""
    size = math.ceil(len(texts) / processes)
    missing = size * processes - len(texts)
    return [*texts, *(missing * list(texts[:1]))][size * process : size * (process + 1)]


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


@functools.cache
def vocabulary(classes: tuple[str, ...]) -> tuple[str, ...]:
    """ImageNet's class names, as open_clip has them, without those in which a class occurs."""
    names = {name.casefold() for label in classes for name in split_label(label)}
    return tuple(
        word
        for word in dict.fromkeys(open_clip.IMAGENET_CLASSNAMES)
        if not any(f" {name} " in f" {word.casefold()} " for name in names)
    )
