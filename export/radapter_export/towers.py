"""The graphs that are exported: one small module each, from raw input to unit-length embeddings.

They hold a copy of the model with the very same parameters, its attention exchanged for one that
exports well, and leave the model as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radapter_serve.adapter import Adapter
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import (
    causal_text_features,
    check_dense,
    is_causal,
    neighbourhood,
    patch_features,
    pool_type,
    text_tower,
)
from radapter_serve.errors import RAdapterError

# How the names of a copy's weights begin; the rest of a name is its key in the state dict.
COPY = "model."


def check(base: Base) -> None:
    """Refuse images that are not square, and towers that give more than one embedding."""
    base.image_size  # noqa: B018 - raises
    text = text_tower(base.model)
    pools = {"image": getattr(base.model.visual, "pool_type", ""), "text": pool_type(text)}
    if getattr(text, "cls_emb", None) is not None or hasattr(text, "pooler"):
        del pools["text"]  # it pools in its own way
    for tower, pool in pools.items():
        if pool == "none":
            raise RAdapterError(
                f"{base.name} cannot be exported: its {tower} tower does not pool (pool_type none)"
            )


class ImageTower(nn.Module):
    """Images to embeddings: normalise, encode, scale to unit length."""

    mean: Tensor
    std: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model = exportable(base.model, only="visual")
        self.register_buffer("mean", torch.tensor(base.preprocess["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(base.preprocess["std"], dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] in RGB to float32 [B, D] of unit length."""
        return unit(self.model.encode_image(self.pixels(image), normalize=False))

    def pixels(self, image: Tensor) -> Tensor:
        """Normalised, float32 [B, 3, S, S]."""
        # To float first: TensorRT cannot transpose uint8.
        return ((image.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


class PatchTower(ImageTower):
    """Images to embeddings of their patches: the image tower with its last block edited."""

    def __init__(self, base: Base, method: str) -> None:
        grid, _ = check_dense(base.model, method).grid_size
        super().__init__(base)
        self.near: Tensor | None
        self.register_buffer("near", neighbourhood(grid) if method == "naclip" else None)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] in RGB to float32 [B, g, g, D] of unit length."""
        return unit(patch_features(self.model.visual, self.pixels(image), self.near))


class TextTower(nn.Module):
    """Token ids to embeddings of unit length; a causal tower takes any length up to its context
    length.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model = exportable(base.model, without="visual")
        transformer: Any = getattr(text_tower(self.model), "transformer", None)
        if hasattr(transformer, "set_attn_implementation"):  # Hugging Face's
            # Written out, as in `Attention`: torch's own guards against NaN, which TensorRT cannot
            # build in 16 bits.
            transformer.set_attn_implementation("eager")
        # Tokens of a text: at most this many if `dynamic_length`, else exactly.
        self.context_length = int(base.tokenizer.context_length)  # type: ignore[attr-defined]
        self.dynamic_length = is_causal(base.model)

    def forward(self, tokens: Tensor) -> Tensor:
        """int32 [B, L] to float32 [B, D] of unit length."""
        if self.dynamic_length:
            return unit(causal_text_features(self.model, tokens))
        return unit(self.model.encode_text(tokens, normalize=False))


class Attention(nn.Module):
    """Attention with the parameters of an `nn.MultiheadAttention`, batch first, written so that it
    exports well.

    Written out instead of `scaled_dot_product_attention`: a quarter fewer nodes, as fast in ONNX
    Runtime.
    """

    in_proj_weight: Tensor
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    in_proj_bias: Tensor

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = original.num_heads
        # Three weights instead of one where keys have another width (`kdim`); the others are None.
        self._separate = original.in_proj_weight is None
        for name in [*(f"{part}_proj_weight" for part in ("in", "q", "k", "v")), "in_proj_bias"]:
            self.register_parameter(name, getattr(original, name))
        self.out_proj = original.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend from `query` [B, L, D] to `key` [B, K, E]; `value` is the same tensor as `key`.

        `attn_mask` is added to the scores: [L, K], or [B·heads, L, K].
        """
        batch, length, width = query.shape
        depth = width // self.num_heads
        q, k, v = (
            part.reshape(batch, -1, self.num_heads, depth).transpose(1, 2)
            for part in self._project(query, key)
        )
        scores = (q * depth**-0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            if attn_mask.ndim > 2:
                attn_mask = attn_mask.reshape(batch, self.num_heads, length, -1)
            scores = scores + attn_mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.out_proj(mixed), None

    def _project(self, query: Tensor, key: Tensor) -> Iterable[Tensor]:
        if query is key:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        # Slices: the exporter turns a chunk of a weight into a sequence, which TensorRT does not
        # take.
        width = len(self.in_proj_bias) // 3
        parts = [slice(i * width, (i + 1) * width) for i in range(3)]
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if self._separate else [self.in_proj_weight[part] for part in parts]
        biases = [self.in_proj_bias[part] for part in parts]
        return map(F.linear, (query, key, key), weights, biases)


def unit(x: Tensor) -> Tensor:
    """Scale to unit length in fp32; by rsqrt, because TensorRT refuses the axes of `F.normalize` as
    they export.
    """
    x = x.float()
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True).clamp_min(1e-24))


def exportable(model: nn.Module, *, only: str = "", without: str = "") -> Any:
    """A copy of a model's structure that holds the same parameters, its attention exchanged for
    `Attention`; with one child `only`, or `without` one.

    The modules are new, so that an exchange leaves the model as it is; parameters and buffers are
    the model's own, so that a large model is in memory once; and their names are the model's, by
    which a graph finds its weights in a state dict.
    """
    memo: dict[int, Any] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())
    }
    for name, child in model.named_children():
        if name == without or (only and name != only):
            memo[id(child)] = None
    exported = copy.deepcopy(model, memo)
    for module in exported.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, Attention(child))
    return exported


def skeleton(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers have shapes but no values, on the `meta`
    device.

    The exporter can fold none of them into the graph then, so one graph serves every α.
    """
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(module, memo)


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
