"""What the library `transformers` calls the weights of a CLIP, and how it describes a model: parts
of every family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from radapter_serve.errors import RAdapterError

_INNER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1"}
_ADAPTED = {"attn.out_proj": "self_attn.out_proj", "mlp.c_proj": "mlp.fc2"}
KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Weight:
    """A tensor, and what it is called.

    Attributes:
        ours: its name in open_clip's state dict; several names share it along its first axis.
        theirs: the same in that of `transformers`.
        transposed: whether theirs is.
        shape: theirs, where it has more or fewer axes of length one; None if it is the same.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Form:
    """A model as `transformers` has it.

    Attributes:
        kind: `clip` or `siglip`, its `model_type`.
        config: the fields of its configuration.
        weights: what it calls them.
    """

    kind: str
    config: dict[str, Any]
    weights: list[Weight]


def to_transformers(
    state_dict: Mapping[str, Tensor], weights: Iterable[Weight]
) -> dict[str, Tensor]:
    """A state dict by the names of `transformers`, fp32."""
    found: dict[str, Tensor] = {}
    for one in weights:
        tensor = _joined([state_dict[name] for name in one.ours])
        tensor = tensor if one.shape is None else tensor.reshape(one.shape)
        tensor = tensor.t() if one.transposed else tensor
        parts = tensor.chunk(len(one.theirs)) if len(one.theirs) > 1 else [tensor]
        found |= {name: part.contiguous() for name, part in zip(one.theirs, parts, strict=True)}
    return found


def to_open_clip(tensors: Mapping[str, Tensor], weights: Iterable[Weight]) -> dict[str, Tensor]:
    """A state dict of a CLIP by the names of open_clip, fp32.

    Raises:
        RAdapterError: a tensor is missing, or one is left over.
    """
    found = {}
    rest = set(tensors)
    for one in weights:
        if missing := [name for name in one.theirs if name not in tensors]:
            raise RAdapterError(f"it has no weight {missing[0]}")
        rest -= set(one.theirs)
        tensor = _joined([tensors[name] for name in one.theirs])
        (name,) = one.ours
        found[name] = tensor.t().contiguous() if one.transposed else tensor
    if rest:
        raise RAdapterError(f"it has the weight {min(rest)}, which a CLIP has not")
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    floats = [part.detach().float() for part in parts]
    return torch.cat(floats) if len(floats) > 1 else floats[0]


def weight(
    ours: str, theirs: str, *, transposed: bool = False, shape: tuple[int, ...] | None = None
) -> Weight:
    """A tensor with one name on each side."""
    return Weight((ours,), (theirs,), transposed, shape)


def pairs(ours: str, theirs: str) -> list[Weight]:
    """Weight and bias of one layer."""
    return [weight(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in KINDS]


def block_weights(ours: str, theirs: str) -> list[Weight]:
    """The weights of one of open_clip's own blocks."""
    weights = [
        Weight(
            (f"{ours}.attn.in_proj_{kind}",),
            tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"),
        )
        for kind in KINDS
    ]
    for one, other in {**_INNER, **_ADAPTED}.items():
        weights += pairs(f"{ours}.{one}", f"{theirs}.{other}")
    return weights


def text_weights(text: Any, prefix: str) -> list[Weight]:
    """The weights of one of open_clip's own text towers, but for its projection."""
    theirs = "text_model"
    weights = [
        weight(f"{prefix}positional_embedding", f"{theirs}.embeddings.position_embedding.weight"),
        weight(f"{prefix}token_embedding.weight", f"{theirs}.embeddings.token_embedding.weight"),
        *pairs(f"{prefix}ln_final", f"{theirs}.final_layer_norm"),
    ]
    for number in range(len(text.transformer.resblocks)):
        weights += block_weights(
            f"{prefix}transformer.resblocks.{number}", f"{theirs}.encoder.layers.{number}"
        )
    return weights


def tower_config(tower: Any, norm: Any) -> dict[str, Any]:
    """The numbers of one of open_clip's own towers."""
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation(block.mlp.gelu),
        "layer_norm_eps": norm.eps,
    }


def activation(layer: nn.Module) -> str:
    """What `transformers` calls an activation; "" if it can't be named."""
    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_pytorch_tanh"
    return ""


def blocks_lack(tower: Any, norms: list[Any]) -> str:
    """How one of open_clip's own towers differs from what `transformers` computes; "" if it does
    not.
    """
    blocks = list(tower.transformer.resblocks)
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            return f"its blocks are of the kind {type(block).__name__}"
        if not (isinstance(block.ls_1, nn.Identity) and isinstance(block.ls_2, nn.Identity)):
            return "its blocks have a LayerScale"
        if not activation(block.mlp.gelu):
            return f"its activation is {type(block.mlp.gelu).__name__}"
        norms = [*norms, block.ln_1, block.ln_2]
    return "its norms differ in their epsilon" if len({norm.eps for norm in norms}) > 1 else ""
