"""What the base is trained by: CLIP's loss with several drawings of a caption, Muon, and a part of
the patches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss, images [C·E, D] being E drawings of each of the texts [C, D]."""
    count = len(texts)
    each = len(images) // len(texts)
    logits = scale * images @ texts.T
    own = torch.arange(count).repeat_interleave(each)
    to_texts = F.cross_entropy(logits, own)
    to_images = -logits.log_softmax(0)[torch.arange(len(images)), own].mean()
    return (to_texts + to_images) / 2


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) in float32, matrices of one shape together: torch's own computes in
    bfloat16, slow on CPUs.
    """

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the orthogonalised momentum, as large as AdamW's (0.2 · √max(a, b), Liu
        2025).
        """
        for group in self.param_groups:
            own = group["params"]
            gradient = torch.stack([p.grad for p in own])
            state = self.state[own[0]]
            kept = state.setdefault("momentum", torch.zeros_like(gradient))
            kept.lerp_(gradient, 1 - group["momentum"])
            x = gradient.lerp(kept, group["momentum"])
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton and Schulz's iteration, Jordan's coefficients
                square = x @ x.mT
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x.mT if tall else x
            size = 0.2 * math.sqrt(max(x.shape[1:]))
            for p, direction in zip(own, x, strict=True):
                p.mul_(1 - group["lr"] * group["decay"]).add_(direction, alpha=-group["lr"] * size)


class KeptPatches(nn.Module):
    """In the place of open_clip's patch dropout: keeps the patches that `index` [B, K] names, and
    the class token.
    """

    index: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] to [B, 1 + K, D]."""
        if not self.training or self.index is None:
            return x
        kept = x[:, 1:].gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], kept], dim=1)
