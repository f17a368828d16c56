"""RepAdapter: a linear bottleneck before attention and before the feed-forward layer, folded into
what comes next.

Luo et al., Towards Efficient Visual Adaption via Structural Re-parameterization, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.blocks import blocks_of, drop_path, width_of
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Loss, System, Tuned


class LinearBottleneck(nn.Module):
    """`h(x) = x + s·(U·(D·x + a) + b)`, with U in groups: each part of the output sees one part of
    the bottleneck.
    """

    def __init__(self, width: int, hidden: int, groups: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Conv1d(hidden, width, 1, groups=groups)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, *self.up.parameters()):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [B, L, d]."""
        change: Tensor = self.up(self.dropout(self.down(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.scale * change

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Fold h into the linear layer that follows, of a weight [k, d] and a bias [k]."""
        change = F.conv1d(self.down.weight, self.up.weight, groups=self.up.groups)  # U·D, [d, d]
        constant = self.up(self.down.bias[:, None])[:, 0]  # U·a + b
        return weight + self.scale * (weight @ change), bias + self.scale * (weight @ constant)


class Reparametrized(Tuned):
    """A CLIP with a `LinearBottleneck`, of arguments `shape`, after both norms of every block."""

    def __init__(
        self, run: Run, loss: Loss, towers: Sequence[str], rate: float, **shape: Any
    ) -> None:
        super().__init__(run, loss)
        self.folds: list[tuple[str, LinearBottleneck]] = []  # with the name of the next layer
        for tower in towers:
            prefix = (
                "visual." if tower == "image" else "text." if hasattr(self.model, "text") else ""
            )
            for number, block in enumerate(blocks_of(self.model, tower)):
                for norm, name in ((block.ln_1, "attn.in_proj_"), (block.ln_2, "mlp.c_fc.")):
                    adapter = LinearBottleneck(width_of(block), **shape)
                    norm.register_forward_hook(
                        lambda _, __, output, adapter=adapter: adapter(output)
                    )
                    self.folds.append((f"{prefix}transformer.resblocks.{number}.{name}", adapter))
        self.extra.extend(
            [*(adapter for _, adapter in self.folds), *drop_path(self.model, towers, rate)]
        )

    @torch.no_grad()
    def clip(self) -> dict[str, Tensor]:
        """Fold every adapter into the next layer, which is exact."""
        weights = dict(self.model.state_dict())
        for layer, adapter in self.folds:
            names = [f"{layer}weight", f"{layer}bias"]
            weights.update(
                zip(names, adapter.folded(*(weights[name] for name in names)), strict=True)
            )
        return weights


@dataclass(frozen=True)
class RepAdapter(Method):
    """RepAdapter by the settings of its code, without MixUp and RandAugment.

    `scale` is s, which the code searches among 0.1, 0.5, 1, 5 and 10 on validation data; dropout
    (DO) is in the bottleneck, drop-path (DP) in the pretrained layers.
    """

    settings: Mapping[str, Any] = paper(
        batch_size=64,
        epochs=100,
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        weight_decay=1e-4,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"
    towers: tuple[str, ...] = ("image", "text")
    hidden: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1
    drop_path: float = 0.1

    def start(self, run: Run) -> System:
        shape = {
            "hidden": self.hidden,
            "groups": self.groups,
            "scale": self.scale,
            "dropout": self.dropout,
        }
        return Reparametrized(run, self.loss, self.towers, self.drop_path, **shape)
