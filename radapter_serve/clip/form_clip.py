"""CLIP's own form in `transformers`, `CLIPModel`: the same function as open_clip's own towers, and
nothing beside.
"""

from __future__ import annotations

from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from torch import nn

from radapter_serve.clip.form import (
    Form,
    block_weights,
    blocks_lack,
    pairs,
    text_weights,
    tower_config,
    weight,
)
from radapter_serve.clip.towers import pool_type, text_tower
from radapter_serve.errors import RAdapterError


def lacks(model: Any, tokenizer: Any) -> str:
    """How an open_clip model differs from all that `CLIPModel` can compute; "" if it does not."""
    return _image_lacks(model.visual) or _text_lacks(text_tower(model), tokenizer)


def form(model: Any, tokenizer: Any) -> Form:
    """The `CLIPModel` that computes what an open_clip model computes.

    Args:
        model: that `lacks` finds nothing wrong with.
        tokenizer: that goes with it.
    """
    visual = model.visual
    text = text_tower(model)
    linear = isinstance(text.text_projection, nn.Linear)
    width = int(visual.proj.shape[1])
    config = {
        "projection_dim": width,
        "logit_scale_init_value": float(model.logit_scale.detach()),
        "vision_config": {
            **tower_config(visual, visual.ln_pre),
            "image_size": int(visual.image_size[0]),
            "patch_size": int(visual.patch_size[0]),
            "projection_dim": width,
        },
        "text_config": {
            **tower_config(text, text.ln_final),
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            "projection_dim": width,
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,
        },
    }
    prefix = "" if text is model else "text."
    image = "vision_model"
    projection = f"{prefix}text_projection{'.weight' if linear else ''}"
    weights = [
        weight("logit_scale", "logit_scale", shape=()),
        weight("visual.class_embedding", f"{image}.embeddings.class_embedding"),
        weight("visual.positional_embedding", f"{image}.embeddings.position_embedding.weight"),
        weight("visual.conv1.weight", f"{image}.embeddings.patch_embedding.weight"),
        *pairs("visual.ln_pre", f"{image}.pre_layrnorm"),  # its name has this slip
        *pairs("visual.ln_post", f"{image}.post_layernorm"),
        weight("visual.proj", "visual_projection.weight", transposed=True),
        *text_weights(text, prefix),
        weight(projection, "text_projection.weight", transposed=not linear),
    ]
    for number in range(len(visual.transformer.resblocks)):
        weights += block_weights(
            f"visual.transformer.resblocks.{number}", f"{image}.encoder.layers.{number}"
        )
    return Form("clip", config, weights)


def open_clip_config(config: Any) -> dict[str, Any]:
    """open_clip's `model_cfg` of a model that a `CLIPConfig` describes.

    Raises:
        RAdapterError: open_clip can't compute it; says why.
    """
    image = config.vision_config
    text = config.text_config
    activations = {image.hidden_act, text.hidden_act}
    quick = activations == {"quick_gelu"}
    if not quick and not activations <= {"gelu", "gelu_pytorch_tanh"}:
        raise RAdapterError(
            f"its activations are {' and '.join(sorted(activations))}; allowed: quick_gelu, or gelu"
        )
    if text.eos_token_id not in (
        2,
        text.vocab_size - 1,
    ):  # 2 stands for the last one in early configurations
        raise RAdapterError(
            f"its texts end with token {text.eos_token_id}; allowed: the last,"
            f" {text.vocab_size - 1}"
        )
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": quick,
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "head_width": image.hidden_size // image.num_attention_heads,
            **_tower(image),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_tower(text),
        },
    }


def _tower(config: Any) -> dict[str, Any]:
    ratio = config.intermediate_size / config.hidden_size
    tower = {"width": config.hidden_size, "layers": config.num_hidden_layers, "mlp_ratio": ratio}
    if config.layer_norm_eps != 1e-5:
        tower["norm_kwargs"] = {"eps": config.layer_norm_eps}
    if config.hidden_act == "gelu_pytorch_tanh":
        tower["act_kwargs"] = {"approximate": "tanh"}
    return tower


def _image_lacks(visual: Any) -> str:
    if not isinstance(visual, VisionTransformer):
        return f"its image tower is of the kind {type(visual).__name__}"
    if not isinstance(visual.ln_pre, nn.LayerNorm):
        return "its image tower has no norm before its blocks"
    if visual.attn_pool is not None or visual.pool_type != "tok":
        return "its image tower pools in another way than by the class token"
    if len(set(visual.image_size)) > 1 or len(set(visual.patch_size)) > 1:
        return "its images or patches are not square"
    return blocks_lack(visual, [visual.ln_pre, visual.ln_post])


def _text_lacks(text: Any, tokenizer: Any) -> str:
    if not hasattr(text, "token_embedding"):
        return f"its text tower is of the kind {type(text).__name__}"
    if (
        getattr(text, "cls_emb", None) is not None
        or text.attn_mask is None
        or pool_type(text) != "argmax"
    ):
        return "its text tower pools in another way than at the end of a causal text"
    if text.text_projection is None or getattr(text.text_projection, "bias", None) is not None:
        return "its text tower has another projection than a matrix"
    if not isinstance(tokenizer, SimpleTokenizer) or tokenizer.reduction_fn is not None:
        return "its tokenizer is not CLIP's"
    if tokenizer.eot_token_id != text.token_embedding.num_embeddings - 1:
        return "its vocabulary is not CLIP's"
    return blocks_lack(text, [text.ln_final])
