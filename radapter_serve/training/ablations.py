"""What the paper's ablations put beside its own parts (Table 5), and the learned scale of its released code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from radapter_serve.adapter import Adapters
from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.training.recipe import Recipe

SCALE = 0.1  # where the released code starts


def ablate(adapters: Adapters, recipe: Recipe) -> None:
    """Give fresh adapters what a recipe asks for beside the paper's own parts.

    Args:
        adapters: with dropout, in activation form.
        recipe: see its `dropout`, `drop_path` and `learned_scale`.
    """
    for site, layer in zip(adapters.sites, adapters.layers, strict=True):
        assert isinstance(layer, LinearAdapter)
        layer.dropout = recipe.dropout
        if recipe.learned_scale:  # h(X) = X + s·X·W_adp; `Adapters.adapter` has s in its W_adp
            layer.scale = nn.Parameter(torch.tensor(SCALE, device=site.layer.weight.device))
    if recipe.drop_path:
        _add_drop_path(adapters, recipe.drop_path)


def _add_drop_path(adapters: Adapters, p: float) -> None:
    """Leave out residual branches of the adapted blocks in training, each for each image or text with probability p."""

    def dropped(x: Tensor) -> Tensor:
        keep = torch.rand(len(x), 1, 1, device=x.device) >= p
        return x * keep / (1 - p)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not adapters.training:
            return output
        return (dropped(output[0]), *output[1:]) if isinstance(output, tuple) else dropped(output)

    for site in adapters.sites:  # the last module of a branch, after the adapter
        adapters.hooks.append(site.output.register_forward_hook(hook))
