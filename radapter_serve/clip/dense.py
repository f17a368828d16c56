"""Embeddings of image patches without training for them: two edits of the image tower's last block.

The blocks before the last stay as they are, and so do adapters, attached in either form or folded.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from radapter_serve.errors import RAdapterError

# maskclip: Zhou, Loy, Dai: Extract Free Dense Labels from CLIP, ECCV 2022. It speaks of the
# attention alone; the authors' ViT keeps residual and feed-forward around it.
# naclip: Hajimiri, Ben Ayed, Dolz: Pay Attention to Your Neighbours, WACV 2025, in its reduced
# form.
METHODS = ("maskclip", "naclip")
STD = 5.0  # of NACLIP's Gaussian, in patches, as its authors have it


def encode_patches(model: Any, pixels: Tensor, method: str) -> Tensor:
    """Embed the patches of images, comparable with texts' embeddings by their cosine.

    MaskCLIP lets each token attend to itself (the attention is `out_proj(v)`) and keeps residual
    and feed-forward. NACLIP takes `softmax(kkᵀ/√d + ω)`, ω a Gaussian of the patches' distance, and
    drops both.

    `pixels` are normalised, float [B, 3, S, S]; the result is float32 [B, g, g, D] of unit length:
    row, column, as in the image, without the class token. The model is open_clip's, plain, folded,
    or with adapters attached.
    """
    visual = check_dense(model, method)
    if tuple(pixels.shape[1:]) != (3, *visual.image_size):
        height, width = visual.image_size
        raise RAdapterError(
            f"pixels are {tuple(pixels.shape)}; this model takes [B, 3, {height}, {width}]"
        )
    near = neighbourhood(visual.grid_size[0]).to(pixels) if method == "naclip" else None
    return F.normalize(patch_features(visual, pixels, near).float(), dim=-1)


def check_dense(model: Any, method: str) -> Any:
    """The image tower of a model, if its patches can be embedded by this method."""
    if method not in METHODS:
        raise RAdapterError(f"dense is {method!r}; allowed: none, {', '.join(METHODS)}")
    visual = getattr(model, "visual", None)
    problem = None
    if not isinstance(visual, VisionTransformer):
        problem = f"its image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None:
        problem = "its image tower pools by attention"
    elif visual.grid_size[0] != visual.grid_size[1]:
        problem = f"its patches form no square ({visual.grid_size[0]} x {visual.grid_size[1]})"
    elif type(visual.transformer.resblocks[-1]) is not ResidualAttentionBlock:
        problem = f"its last block is a {type(visual.transformer.resblocks[-1]).__name__}"
    elif visual.training and not isinstance(visual.patch_dropout, nn.Identity):
        problem = "it drops patches while it is trained; call model.eval()"
    if problem:
        raise RAdapterError(
            f"{type(model).__name__} gives no dense embeddings: {problem}; allowed: models whose"
            " image tower is open_clip's own transformer, such as ViT-B-16"
        )
    return visual


def patch_features(visual: Any, pixels: Tensor, near: Tensor | None) -> Tensor:
    """The image tower with its last block edited: [B, 3, S, S] to [B, g, g, D], not normalised.

    `near` is the `neighbourhood` of the grid for NACLIP, None for MaskCLIP. The tower's attention
    may be another module with the same parameters.
    """
    x = visual._embeds(pixels)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    # A call of the module, not of its weights: an adapter may stand in a hook on it.
    attention = copy.copy(last.attn)
    attention.forward = functools.partial(_attend, last.attn, near)
    attended = last.ls_1(attention(last.ln_1(x))[0])
    if near is None:
        x = x + attended
        x = x + last.ls_2(last.mlp(last.ln_2(x)))
    else:
        x = attended
    x = visual.ln_post(x[:, 1:])
    embeds: Tensor = x if visual.proj is None else x @ visual.proj
    return embeds.reshape(-1, *visual.grid_size, embeds.shape[-1])


def neighbourhood(grid: int) -> Tensor:
    """The bias of NACLIP's attention, `exp(-d²/2σ²)` for patches at distance d, float32 [1 + g², 1
    + g²] for g patches a side; 0 in the row and the column of the class token.
    """
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float()
    squares = (places[:, None] - places).square().sum(dim=-1)
    return F.pad(torch.exp(-squares / (2 * STD**2)), (1, 0, 1, 0))


def _attend(attention: Any, near: Tensor | None, x: Tensor) -> tuple[Tensor, None]:
    batch, length, width = x.shape
    depth = width // attention.num_heads
    parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    shape = (batch, length, attention.num_heads, depth)
    _, keys, values = (part.reshape(shape).transpose(1, 2) for part in parts)
    if near is not None:
        scores = (keys * depth**-0.5) @ keys.transpose(-1, -2) + near
        values = scores.softmax(dim=-1) @ values
    return attention.out_proj(values.transpose(1, 2).reshape(batch, length, width)), None
