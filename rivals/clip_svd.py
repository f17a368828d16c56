"""CLIP-SVD: the singular values of all matrices of both towers, and nothing else, learn.

Koleilat, Rivaz and Xiao, Singular Value Few-shot Adaptation of Vision-Language Models, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rivals.blocks import blocks_of
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Loss, System, Tuned


class Spectrum(nn.Module):
    """`W = U·diag(s)·Vᵀ`, whose s learn; a weight [3d, d] of queries, keys and values is three."""

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        self.parts = parts
        left, values, right = torch.linalg.svd(
            torch.stack(weight.detach().chunk(parts)), full_matrices=False
        )
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor
        self.values = nn.Parameter(values)

    def forward(self, weight: Tensor) -> Tensor:
        """Compute the weight, which replaces the base's."""
        with torch.autocast(weight.device.type, enabled=False):  # a weight in 16 bits is another
            product = (self.left * self.values[:, None]) @ self.right
        return product.flatten(0, 1)


class SingularValues(Tuned):
    """A CLIP with a `Spectrum` in place of each matrix of its blocks."""

    def __init__(self, run: Run, loss: Loss) -> None:
        super().__init__(run, loss)
        self.names = list(self.model.state_dict())
        for tower in ("image", "text"):
            for block in blocks_of(self.model, tower):
                for layer, name, parts in (
                    (block.attn, "in_proj_weight", 3),
                    (block.attn.out_proj, "weight", 1),
                    (block.mlp.c_fc, "weight", 1),
                    (block.mlp.c_proj, "weight", 1),
                ):
                    spectrum = Spectrum(getattr(layer, name), parts)
                    parametrize.register_parametrization(layer, name, spectrum, unsafe=True)

    @torch.no_grad()
    def clip(self) -> dict[str, Tensor]:
        """Multiply every spectrum out, which is exact and linear in the singular values."""
        weights = {}
        for name in self.names:
            layer, _, last = name.rpartition(".")
            weights[name] = getattr(self.model.get_submodule(layer), last).detach()
        return weights


@dataclass(frozen=True)
class CLIPSVD(Method):
    """CLIP-SVD in both towers; its code has another rate for each data set, 1e-3 is ours."""

    settings: Mapping[str, Any] = paper(
        batch_size=32,
        epochs=50,
        learning_rate=1e-3,
        min_learning_rate=1e-6,
        weight_decay=0.01,
        warmup_steps=0,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"

    def start(self, run: Run) -> System:
        return SingularValues(run, self.loss)
