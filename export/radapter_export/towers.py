"""The graphs that are exported: one small module each, from raw input to unit-length embeddings.

They hold the very parameters of the model they are made from, under other attention modules, and leave that model as it
is. `check` is the one place that says which models can be exported.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from radapter_serve.dense import WAYS, check_dense, neighbourhood, patch_features
from radapter_serve.errors import RAdapterError
from radapter_serve.towers import is_causal, pool_type, text_tower


def check(model: nn.Module) -> None:
    """Refuse a model whose towers are not open_clip's own transformers.

    Raises:
        RAdapterError: names the part that cannot be exported.
    """
    text = text_tower(model)
    image = getattr(model, "visual", None)
    problem = None
    if not isinstance(image, VisionTransformer):
        problem = f"its image tower is a {type(image).__name__}"
    elif image.attn_pool is not None:
        problem = "its image tower pools by attention"
    elif image.image_size[0] != image.image_size[1]:
        problem = f"its input is not square ({image.image_size[0]} x {image.image_size[1]})"
    elif not isinstance(getattr(text, "transformer", None), Transformer):
        problem = f"its text tower is a {type(text).__name__}"
    elif getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        problem = "its text tower has a class token or masks its padding"
    elif pool_type(text) == "none":
        problem = "its text tower does not pool"
    else:
        blocks = [*image.transformer.resblocks, *text.transformer.resblocks]
        other = next((block for block in blocks if type(block) is not ResidualAttentionBlock), None)
        if other is not None:
            problem = f"it has blocks of class {type(other).__name__}"
    if problem:
        raise RAdapterError(
            f"{type(model).__name__} cannot be exported: {problem}; allowed: models whose towers are both open_clip's "
            f"own transformers, such as ViT-B-32, ViT-B-16, ViT-L-14"
        )


class ImageTower(nn.Module):
    """Images to embeddings: normalise, encode, scale to unit length.

    Args:
        model: an open_clip model that `check` accepts.
        preprocess: its `preprocess_cfg`; `mean` and `std` are used.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, preprocess: Mapping[str, Any]) -> None:
        super().__init__()
        self.visual: Any = share(model.visual)
        self.register_buffer("mean", torch.tensor(preprocess["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(preprocess["std"], dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] in RGB to float32 [B, D] of unit length."""
        return unit(self.visual(self.pixels(image)))

    def pixels(self, image: Tensor) -> Tensor:
        """Normalised, float32 [B, 3, S, S]."""
        # To float first: TensorRT cannot transpose uint8.
        return ((image.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


class PatchTower(ImageTower):
    """Images to embeddings of their patches: the image tower with its last block edited.

    Args:
        model: an open_clip model that `check` accepts.
        preprocess: its `preprocess_cfg`; `mean` and `std` are used.
        way: one of `radapter_serve.dense.WAYS`.
    """

    def __init__(self, model: Any, preprocess: Mapping[str, Any], way: str) -> None:
        grid, _ = check_dense(model, way).grid_size
        super().__init__(model, preprocess)
        self._way = WAYS[way]
        self.near: Tensor | None
        self.register_buffer("near", None if self._way.std is None else neighbourhood(grid, self._way.std))

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] in RGB to float32 [B, g, g, D] of unit length."""
        return unit(patch_features(self.visual, self.pixels(image), self._way, self.near))


class TextTower(nn.Module):
    """Token ids to embeddings of unit length; a causal tower takes any length up to its context length.

    Args:
        model: an open_clip model that `check` accepts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        text = share(text_tower(model), without="visual")
        self.token_embedding, self.positional_embedding = text.token_embedding, text.positional_embedding
        self.transformer, self.ln_final, self.text_projection = text.transformer, text.ln_final, text.text_projection
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self._pool = pool_type(text)
        self._eos_id: int | None = getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)
        #: tokens of one text: at most this many if `dynamic_length`, else exactly
        self.context_length = int(text.positional_embedding.shape[0])
        self.dynamic_length = is_causal(model)

    def forward(self, tokens: Tensor) -> Tensor:
        """int32 [B, L] to float32 [B, D] of unit length."""
        length = tokens.shape[1]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        x = text_global_pool(x, tokens, self._pool, eos_token_id=self._eos_id)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return unit(x)


class Attention(nn.Module):
    """Self-attention with the parameters of an `nn.MultiheadAttention`, batch first, written so that it exports well.

    Written out instead of `scaled_dot_product_attention`: a quarter fewer nodes, as fast in ONNX Runtime.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = original.num_heads
        self.in_proj_weight, self.in_proj_bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = original.out_proj

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attend within `x` [B, L, D]; key and value are the same tensor, as in every block of a tower."""
        batch, length, width = x.shape
        depth = width // self.num_heads
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.reshape(batch, length, self.num_heads, depth).transpose(1, 2) for part in projected)
        scores = (q * depth**-0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + attn_mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
        return self.out_proj(mixed), None


def unit(x: Tensor) -> Tensor:
    """Scale to unit length in fp32; by rsqrt, because TensorRT refuses the axes of `F.normalize` as they export."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True).clamp_min(1e-24))


def share(module: nn.Module, without: str = "") -> Any:
    """A copy of a module's structure that holds the same parameters, its attention exchanged for `Attention`.

    Args:
        module: left as it is.
        without: name of a child that the copy need not have.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    if child := getattr(module, without, None) if without else None:
        memo[id(child)] = nn.Identity()
    return _exchange(copy.deepcopy(module, memo))


def skeleton(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers have shapes but no values, on the `meta` device."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(module, memo)


def _exchange(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, Attention(child) if isinstance(child, nn.MultiheadAttention) else _exchange(child))
    return module
