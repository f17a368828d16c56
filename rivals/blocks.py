"""The blocks of open_clip's transformers, into which methods hook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torchvision.ops import StochasticDepth

from radapter_serve.clip.towers import is_causal, text_tower
from radapter_serve.errors import RAdapterError


def blocks_of(model: nn.Module, tower: str) -> list[Any]:
    """List the residual blocks of a tower, `image` or `text`, of open_clip's own kind; those of
    texts must be causal.
    """
    holder = text_tower(model) if tower == "text" else getattr(model, "visual", None)
    blocks = list(getattr(getattr(holder, "transformer", None), "resblocks", []))
    known = bool(blocks) and all(type(block) is ResidualAttentionBlock for block in blocks)
    if not known or (tower == "text" and not is_causal(model)):
        raise RAdapterError(
            f"this rival needs open_clip's own transformers, such as those of ViT-B-16; the {tower}"
            f" tower of this {type(model).__name__} is a {type(holder).__name__} of another kind"
        )
    return blocks


def width_of(block: Any) -> int:
    """Return the width of a token between blocks."""
    return int(block.mlp.c_fc.in_features)


def drop_path(model: nn.Module, towers: Iterable[str], rate: float) -> list[nn.Module]:
    """Drop an input's attention or feed-forward branches at random (stochastic depth), with a
    probability that rises from 0 at the first block to `rate` at the last.

    Returns modules that drop while they are in training mode.
    """
    layers: list[nn.Module] = []
    for tower in towers if rate else ():
        blocks = blocks_of(model, tower)
        for number, block in enumerate(blocks):
            layer = StochasticDepth(rate * number / max(1, len(blocks) - 1), "row")
            for branch in (block.ls_1, block.ls_2):  # the last thing before the residual is added
                branch.register_forward_hook(lambda _, __, output, layer=layer: layer(output))
            layers.append(layer)
    return layers
