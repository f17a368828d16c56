"""AdaptFormer: a bottleneck with a ReLU beside the feed-forward layer of every block; it can't be
folded.

Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, NeurIPS
2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from rivals.blocks import blocks_of, drop_path, width_of
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Loss, System, Tuned


class Parallel(nn.Module):
    """Adds `s·U·relu(D·x + a) + s·b` to a block's feed-forward branch, where x is the input of the
    branch's norm.
    """

    def __init__(self, block: Any, hidden: int, scale: float, dropout: float) -> None:
        super().__init__()
        width = width_of(block)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self._x: Tensor | None = None
        block.ln_2.register_forward_pre_hook(self._keep)
        block.ls_2.register_forward_hook(self._add)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the change of tokens [B, L, d]."""
        change: Tensor = self.up(self.dropout(self.down(x).relu()))
        return change * self.scale

    def _keep(self, module: nn.Module, args: Any) -> None:
        self._x = args[0]

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self._x is not None
        change: Tensor = self(self._x)
        self._x = None
        return output + change


class Paralleled(Tuned):
    """A CLIP with a `Parallel` in every block; arguments as of `AdaptFormer`."""

    def __init__(
        self,
        run: Run,
        loss: Loss,
        towers: Sequence[str],
        hidden: int,
        scale: float,
        dropout: float,
        rate: float,
    ) -> None:
        super().__init__(run, loss)
        # Drop-path first: it drops the pretrained branch, not the change that an adapter adds.
        dropping = drop_path(self.model, towers, rate)
        blocks = [block for tower in towers for block in blocks_of(self.model, tower)]
        self.extra.extend(
            [*dropping, *(Parallel(block, hidden, scale, dropout) for block in blocks)]
        )


@dataclass(frozen=True)
class AdaptFormer(Method):
    """AdaptFormer by the settings of its code, without a batch norm before the head, which CLIP
    lacks.

    The learning rate is for 512 images a step, and proportional to their number. `hidden` is the
    width of the bottleneck, `scale` is s; dropout (DO) is after the ReLU, drop-path (DP) in the
    pretrained layers.
    """

    settings: Mapping[str, Any] = paper(
        batch_size=512,
        epochs=100,
        learning_rate=0.2,
        min_learning_rate=0.0,
        weight_decay=0.0,
        grad_clip=None,
        crop_scale=0.08,
        flip=True,
    )
    loss: Loss = "classes"
    towers: tuple[str, ...] = ("image", "text")
    hidden: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    drop_path: float = 0.0

    def start(self, run: Run) -> System:
        return Paralleled(
            run, self.loss, self.towers, self.hidden, self.scale, self.dropout, self.drop_path
        )

    def optimizer(self, system: System, run: Run) -> Optimizer:
        recipe = run.recipe
        learning = [{"params": system.learning(), "share": recipe.batch_size / 512}]
        return SGD(learning, lr=recipe.peak_rate, momentum=0.9, weight_decay=recipe.weight_decay)
