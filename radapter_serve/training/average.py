"""Accumulation: an average of the adapters over the steps of a run (Eq. 8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from radapter_serve.adapter import Adapters


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
