"""α as an input of a tower: adapters stay beside their linear layers, and each row has its α."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from radapter_export.towers import COPY
from radapter_serve.adapter import Adapter


def name_in_base(name: str) -> str:
    """The name of a tower's parameter or buffer in a state dict or an adapter file."""
    return name.removeprefix("tower.").removeprefix(COPY).removesuffix(".full")


class DynamicAlphaTower(nn.Module):
    """A tower with a second input, `alpha` float32 [B, 1], in place of one α that is folded into
    its weights.

    The adapted layers of the tower are exchanged in place; only names and shapes of the adapter
    count.
    """

    def __init__(self, tower: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.tower = tower
        self._alpha = _Alpha()
        modules = dict(tower.named_modules())
        for key in adapter.keys:
            name = COPY + key
            if isinstance(layer := modules.get(name), nn.Linear):
                tower.set_submodule(
                    name, DynamicAlphaLinear(layer, adapter.layer(key), self._alpha)
                )

    def forward(self, values: Tensor, alpha: Tensor) -> Tensor:
        """The tower's embeddings of rows, each at its α."""
        self._alpha.rows = alpha
        embeds: Tensor = self.tower(values)
        return embeds


class DynamicAlphaLinear(nn.Module):
    """`y + α·F·y` with `y = W·x + b`, which is what the fold at α computes: (W + α·F·W)·x + (b +
    α·F·b).

    W is [d, k] and b [d]; the adapter has `full` [d, d], or `up` [d, r] and `down` [r, d].
    """

    full: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, layer: nn.Linear, adapter: dict[str, Tensor], alpha: _Alpha) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        for name, tensor in adapter.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._full_rank = "full" in adapter
        self._alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., k] to [B, ..., d]."""
        y = F.linear(x, self.weight, self.bias)
        if self._full_rank:
            change = F.linear(y, self.full)
        else:
            change = F.linear(F.linear(y, self.down), self.up)
        alpha = self._alpha.rows.to(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
        return y + alpha * change


class _Alpha:
    """Holds α of the rows while their tower runs; an attribute of a module would be its state."""

    rows: Tensor
