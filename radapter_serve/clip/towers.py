"""The two towers of a CLIP as functions that embed images, texts, classes and patches at unit
length.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer, text_global_pool
from torch import Tensor, nn

from radapter_serve.contract.errors import Alpha
from radapter_serve.contract.labels import means_of, prompts_of, read_templates, split_label
from radapter_serve.errors import RAdapterError, reason

# maskclip: Zhou, Loy, Dai: Extract Free Dense Labels from CLIP, ECCV 2022. Each token attends to
# itself; as in the authors' ViT, the block keeps residual and feed-forward.
# naclip: Hajimiri, Ben Ayed, Dolz: Pay Attention to Your Neighbours, WACV 2025, in its reduced
# form: `softmax(kkᵀ/√d + ω)`, ω a Gaussian of the patches' distance, without these two.
METHODS = ("maskclip", "naclip")
STD = 5.0  # of NACLIP's Gaussian, in patches, as in the authors' code
_BATCH = 256  # texts
Tokenizer = Callable[[list[str]], Tensor]
Pixels = NDArray[np.uint8]
Embeds = NDArray[np.float32]


def encode_image(model: Any, pixels: Tensor) -> Tensor:
    """Embed normalised images, float [B, 3, S, S], as float32 [B, D] of unit length."""
    return F.normalize(model.encode_image(pixels).float(), dim=-1)


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Embed token ids, integer [N, L], padded, as float32 [N, D] of unit length."""
    unique, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    if is_causal(model):
        # Crop after the last token that a row is pooled at, which later tokens can't change. Zeros
        # pad, but 0 is a token too ("!").
        text = text_tower(model)
        ends = unique if pool_type(text) == "argmax" else unique.eq(_eos_id(text)).int()
        length = int(ends.argmax(dim=1).max()) + 1 if len(unique) else unique.shape[1]
        features = causal_text_features(model, unique[:, :length])
    else:
        features = model.encode_text(unique)
    return F.normalize(features.float(), dim=-1)[inverse]


def encode_texts(model: Any, tokens: Tensor) -> Tensor:
    """Embed texts on any device in batches of similar length, as `encode_text` does."""
    device = next(model.parameters()).device
    order = torch.argsort(tokens.ne(0).sum(dim=1), stable=True)
    embeds = torch.cat(
        [encode_text(model, tokens[some].to(device)) for some in torch.split(order, _BATCH)]
    )
    return embeds[torch.argsort(order).to(device)]


class TorchEncoder:
    """`Encoder` of a model in torch, on the model's device, with its dense method."""

    def __init__(
        self, model: nn.Module, preprocess: Mapping[str, Any], dense: str | None = None
    ) -> None:
        self.model = model
        self._preprocess = preprocess
        self._device = next(model.parameters()).device
        self._dense = dense

    def images(self, pixels: Pixels, alpha: Alpha | None = None) -> Embeds:
        return self.embed(encode_image, alpha, normalised(pixels, self._preprocess, self._device))

    def patches(self, pixels: Pixels, alpha: Alpha | None = None) -> Embeds:
        pixels_in = normalised(pixels, self._preprocess, self._device)
        return self.embed(encode_patches, alpha, pixels_in, self._dense)

    def by_method(self, dense: str) -> TorchEncoder:
        """This encoder with another dense method, on the same model."""
        other = copy.copy(self)
        other._dense = dense
        return other

    def tokens(self, tokens: NDArray[np.int32], alpha: Alpha | None = None) -> Embeds:
        rows = torch.from_numpy(np.asarray(tokens, np.int64)).to(self._device)
        return self.embed(encode_text, alpha, rows)

    @torch.inference_mode()
    def embed(self, encode: Callable[..., Tensor], alpha: Alpha | None, *inputs: Any) -> Embeds:
        """Call one of the encode functions; the weights are at their α already."""
        embeds = encode(self.model, *inputs)
        return np.asarray(embeds.float().cpu().numpy())

    def close(self) -> None:
        """Do nothing; the model is freed with its last reference."""


def normalised(pixels: NDArray[np.uint8], preprocess: Mapping[str, Any], device: Any) -> Tensor:
    """Normalise pixels, uint8 [B, S, S, 3] in RGB, to float32 [B, 3, S, S], with mean and std."""
    scaled = (
        torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
    )
    mean, std = (torch.tensor(preprocess[name], device=device) for name in ("mean", "std"))
    return (scaled - mean[:, None, None]) / std[:, None, None]


def to_device(model: nn.Module, name: str | None = None) -> torch.device:
    """Move a model, in place, to a device of torch; None takes a GPU if there is one."""
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by build of torch
        raise RAdapterError(
            f"device {wanted!r} can't be used: {reason(error)}; allowed: cpu, cuda, ..."
        ) from error
    return device


def logit_scale_and_bias(weights: Mapping[str, Tensor]) -> tuple[float, float | None]:
    """Factor from cosines to logits, and bias of a sigmoid loss or None, from a state dict."""
    bias = weights.get("logit_bias")
    return float(weights["logit_scale"].float().exp()), None if bias is None else float(bias)


def is_causal(model: nn.Module) -> bool:
    """True if cropping a batch of texts to its longest text does not change the embeddings."""
    text = text_tower(model)
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return (
        causal and not getattr(text, "use_pad_mask", False) and pool_type(text) in ("argmax", "eos")
    )


def text_tower(model: nn.Module) -> Any:
    """The module that holds the text tower's parameters: open_clip's CLIP holds them itself."""
    return getattr(model, "text", model)


def pool_type(text: Any) -> str:
    """The text tower's pooling: `argmax`, `eos`, `last`, `first`."""
    return str(getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "none"))


def _eos_id(text: Any) -> Any:
    return getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)


def causal_text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """Run a causal text tower on texts of any length: [N, L] to [N, D], not normalised."""
    text = text_tower(model)
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x: Tensor = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(
        dtype
    )
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    x = text_global_pool(x, tokens, pool_type(text), eos_token_id=_eos_id(text))
    projection = text.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return x


def templates_of(source: str | Path | Sequence[str]) -> list[str]:
    """Read prompt templates, as `read_templates` does, or OpenAI's 80 for ImageNet, `openai`."""
    if source == "openai":
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return read_templates(source)


@torch.no_grad()
def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Embed classes, float32 [C, D]: the mean over a class's names and all templates."""
    prompts = [prompts_of(split_label(line), templates) for line in classes]
    texts = list(dict.fromkeys(itertools.chain.from_iterable(prompts)))
    embeds = np.asarray(encode_texts(model, tokenizer(texts)).cpu())
    means = torch.from_numpy(means_of(prompts, texts, embeds))
    return means.to(next(model.parameters()).device)


def encode_patches(model: Any, pixels: Tensor, method: str) -> Tensor:
    """Embed the patches of normalised images, [B, 3, S, S], as float32 [B, g, g, D] of unit length,
    row by row, to compare with embeddings of texts.
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
    """The image tower of a model; an error if this method can't embed its patches."""
    if method not in METHODS:
        raise RAdapterError(f"dense is {method!r}; allowed: none, {', '.join(METHODS)}")
    visual = getattr(model, "visual", None)
    problem = None
    if not isinstance(visual, VisionTransformer):
        problem = f"its image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None:
        problem = "its image tower pools with attention"
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
    """Run the image tower with an edited last block, [B, 3, S, S] to [B, g, g, D]; `near` is the
    `neighbourhood` for NACLIP, None for MaskCLIP.
    """
    x = visual._embeds(pixels)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    # Call a copy of the module, not `_attend` alone: an adapter may be a hook on the module.
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
    """Bias of NACLIP's attention, `exp(-d²/2σ²)` for patches at distance d, float32
    [1 + g², 1 + g²] for g patches a side; 0 in the row and the column of the class token.
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
