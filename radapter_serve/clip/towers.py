"""The two towers of a CLIP as functions to unit-length embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from radapter_serve.errors import RAdapterError, reason


def encode_image(model: Any, pixels: Tensor) -> Tensor:
    """Embed normalised images, float [B, 3, S, S], as float32 [B, D] of unit length."""
    return F.normalize(model.encode_image(pixels).float(), dim=-1)


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Embed token ids, integer [N, L], padded, as float32 [N, D] of unit length.

    Equal texts are encoded once, and causal towers see no more tokens than the longest text has.
    Both are exact: a causal tower pools at the end token, which nothing after it can reach.
    """
    unique, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    if is_causal(model):
        # Up to the last token that a row is pooled at; 0 pads but is a token too ("!").
        text = text_tower(model)
        ends = unique if pool_type(text) == "argmax" else unique.eq(_eos_id(text)).int()
        length = int(ends.argmax(dim=1).max()) + 1 if len(unique) else unique.shape[1]
        features = causal_text_features(model, unique[:, :length])
    else:
        features = model.encode_text(unique)
    return F.normalize(features.float(), dim=-1)[inverse]


def encode_texts(model: Any, tokens: Tensor, batch_size: int = 256) -> Tensor:
    """Embed one or more texts in batches of similar length, as `encode_text` does; `tokens` may be
    on any device, the result is on the model's.
    """
    device = next(model.parameters()).device
    order = torch.argsort(tokens.ne(0).sum(dim=1), stable=True)
    embeds = torch.cat(
        [encode_text(model, tokens[some].to(device)) for some in torch.split(order, batch_size)]
    )
    return embeds[torch.argsort(order).to(device)]


def normalised(pixels: NDArray[np.uint8], preprocess: Mapping[str, Any], device: Any) -> Tensor:
    """Pixels as the image tower takes them: uint8 [B, S, S, 3] in RGB to float32 [B, 3, S, S], by
    the mean and std of `preprocess`, each in [0, 1].
    """
    scaled = (
        torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
    )
    mean, std = (torch.tensor(preprocess[name], device=device) for name in ("mean", "std"))
    return (scaled - mean[:, None, None]) / std[:, None, None]


def to_device(model: nn.Module, name: str | None = None) -> torch.device:
    """Move a model, in place, to a device of torch; None takes a GPU where there is one."""
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as torch was built
        raise RAdapterError(
            f"device {wanted!r} can't be used: {reason(error)}; allowed: cpu, cuda, ..."
        ) from error
    return device


def logit_scale_and_bias(weights: Mapping[str, Tensor]) -> tuple[float, float | None]:
    """The factor from cosines to logits, and the bias of a sigmoid loss, of a state dict."""
    bias = weights.get("logit_bias")
    return float(weights["logit_scale"].float().exp()), None if bias is None else float(bias)


def is_causal(model: nn.Module) -> bool:
    """True if cropping a batch of texts to its longest one leaves the embeddings as they are."""
    text = text_tower(model)
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return (
        causal and not getattr(text, "use_pad_mask", False) and pool_type(text) in ("argmax", "eos")
    )


def text_tower(model: nn.Module) -> Any:
    """The module that holds the text tower's parameters: open_clip's CLIP holds them itself."""
    return getattr(model, "text", model)


def pool_type(text: Any) -> str:
    """How the text tower pools: `argmax`, `eos`, `last`, `first`."""
    return str(getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "none"))


def _eos_id(text: Any) -> Any:
    return getattr(text, "text_eos_id", None) or getattr(text, "eos_id", None)


def causal_text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """A causal text tower on texts of any length up to its context length: [N, L] to [N, D], not
    normalised.
    """
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
