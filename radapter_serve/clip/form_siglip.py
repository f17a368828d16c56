"""SigLIP's form in `transformers`, `SiglipModel`: timm's image tower, pooled by attention, and a
text tower.
"""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from radapter_serve.clip.form import (
    KINDS,
    Form,
    Weight,
    activation,
    blocks_lack,
    pairs,
    text_weights,
    tower_config,
    weight,
)
from radapter_serve.clip.towers import pool_type, text_tower

_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_POOL = {
    "norm": "layernorm",
    "proj": "attention.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def is_siglip(model: Any) -> bool:
    """Whether the image tower is of SigLIP's kind: all else about the model is for `lacks` to
    say.
    """
    visual = model.visual
    return isinstance(visual, TimmModel) and isinstance(
        getattr(visual.trunk, "attn_pool", None), AttentionPoolLatent
    )


def lacks(model: Any, tokenizer: Any) -> str:
    """How an open_clip model of SigLIP's kind differs from all that `SiglipModel` can compute; ""
    if it does not.
    """
    return _image_lacks(model.visual) or _text_lacks(model, tokenizer)


def form(model: Any, tokenizer: Any) -> Form:
    """The `SiglipModel` that computes what an open_clip model computes.

    Args:
        model: that `lacks` finds nothing wrong with.
        tokenizer: that goes with it.
    """
    trunk = model.visual.trunk
    text = text_tower(model)
    block = trunk.blocks[0]
    inner = tokenizer.tokenizer
    config = {
        "vision_config": {
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": int(trunk.patch_embed.img_size[0]),
            "patch_size": int(trunk.patch_embed.patch_size[0]),
            "hidden_act": activation(block.mlp.act),
            "layer_norm_eps": block.norm1.eps,
        },
        "text_config": {
            **tower_config(text, text.ln_final),
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            "projection_size": text.text_projection.out_features,
            "bos_token_id": inner.bos_token_id,
            "eos_token_id": inner.eos_token_id,
            "pad_token_id": inner.pad_token_id,
        },
    }
    ours = "visual.trunk"
    theirs = "vision_model"
    places = trunk.pos_embed.shape[1:]
    weights = [
        weight("logit_scale", "logit_scale", shape=(1,)),
        weight("logit_bias", "logit_bias", shape=(1,)),
        weight(
            f"{ours}.pos_embed",
            f"{theirs}.embeddings.position_embedding.weight",
            shape=tuple(places),
        ),
        *pairs(f"{ours}.patch_embed.proj", f"{theirs}.embeddings.patch_embedding"),
        *pairs(f"{ours}.norm", f"{theirs}.post_layernorm"),
        *_pool(f"{ours}.attn_pool", f"{theirs}.head"),
        *text_weights(text, "text."),
        *pairs("text.text_projection", "text_model.head"),
    ]
    for number in range(len(trunk.blocks)):
        weights += _block(f"{ours}.blocks.{number}", f"{theirs}.encoder.layers.{number}")
    return Form("siglip", config, weights)


def _block(ours: str, theirs: str) -> list[Weight]:
    weights = [
        Weight(
            (f"{ours}.attn.qkv.{kind}",),
            tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"),
        )
        for kind in KINDS
    ]
    for one, other in _BLOCK.items():
        weights += pairs(f"{ours}.{one}", f"{theirs}.{other}")
    return weights


def _pool(ours: str, theirs: str) -> list[Weight]:
    """Of the pooling, whose queries have a layer of their own in timm, and share one with keys and
    values here.
    """
    weights = [weight(f"{ours}.latent", f"{theirs}.probe")]
    weights += [
        Weight((f"{ours}.q.{kind}", f"{ours}.kv.{kind}"), (f"{theirs}.attention.in_proj_{kind}",))
        for kind in KINDS
    ]
    for one, other in _POOL.items():
        weights += pairs(f"{ours}.{one}", f"{theirs}.{other}")
    return weights


def _image_lacks(visual: Any) -> str:
    trunk = visual.trunk
    pool = visual.trunk.attn_pool
    if (
        type(trunk) is not VisionTransformer
        or len(visual.head)
        or not isinstance(trunk.head, nn.Identity)
    ):
        return "its image tower has more than SigLIP's"
    nothing = [trunk.norm_pre, trunk.fc_norm, pool.q_norm, pool.k_norm]
    if (
        trunk.num_prefix_tokens
        or pool.pos_embed is not None
        or pool.latent_len != 1
        or pool.mlp is None
    ):
        return "its image tower pools in another way than SigLIP's"
    if (
        trunk.pos_embed is None
        or len(set(trunk.patch_embed.img_size)) > 1
        or len(set(trunk.patch_embed.patch_size)) > 1
    ):
        return "its images or patches are not square"
    norms = [trunk.norm, pool.norm]
    activations = [pool.mlp.act]
    for block in trunk.blocks:
        if type(block) is not Block:
            return f"its blocks are of the kind {type(block).__name__}"
        nothing += [
            block.ls1,
            block.ls2,
            block.attn.q_norm,
            block.attn.k_norm,
            block.attn.norm,
            block.mlp.norm,
        ]
        norms += [block.norm1, block.norm2]
        activations.append(block.mlp.act)
    if not all(isinstance(layer, nn.Identity) for layer in nothing):
        return "its blocks have norms or scales that SigLIP's have not"
    if {activation(layer) for layer in activations} not in ({"gelu"}, {"gelu_pytorch_tanh"}):
        return "its activations are not GELU"
    first: Any = trunk.blocks[0]
    if (
        pool.num_heads != first.attn.num_heads
        or pool.mlp.fc1.out_features != first.mlp.fc1.out_features
    ):
        return "its pooling has other numbers than its blocks"
    return "its norms differ in their epsilon" if len({norm.eps for norm in norms}) > 1 else ""


def _text_lacks(model: Any, tokenizer: Any) -> str:
    text = text_tower(model)
    if not hasattr(text, "token_embedding"):
        return f"its text tower is of the kind {type(text).__name__}"
    if getattr(model, "logit_bias", None) is None:
        return "it has no bias on its logits"
    if (
        text is model
        or text.attn_mask is not None
        or text.use_pad_mask
        or pool_type(text) != "last"
    ):
        return "its text tower pools in another way than at the last place"
    if (
        not isinstance(text.text_projection, nn.Linear)
        or text.text_projection.bias is None
        or text.cls_emb is not None
    ):
        return "its text tower has another projection than SigLIP's"
    if (
        not isinstance(tokenizer, HFTokenizer)
        or tokenizer.tokenizer_mode
        or tokenizer.strip_sep_token
    ):
        return "its tokenizer is not of SigLIP's kind"
    return blocks_lack(text, [text.ln_final])
