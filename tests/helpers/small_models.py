"""A small model with random weights of each family that can be adapted, as a folder that open_clip
loads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_serve.adapter import Adapter
    from radapter_serve.release.release import Release
    from radapter_serve.sources import Adapt

IMAGE = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
# Read by a tokenizer of bytes: its ids are few, so the models are small.
SHORT_TEXT = {**TEXT, "context_length": 16, "vocab_size": 320, "hf_tokenizer_name": "here"}
SIGLIP_TEXT = {
    **SHORT_TEXT,
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
BERT = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
ROBERTA = {
    **BERT,
    "max_position_embeddings": 40,
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MT5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
}
M2M = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
}


def _timm(name: str, size: int = 32, pool: str = "token", **fields: Any) -> dict[str, Any]:
    return {
        "timm_model_name": name,
        "timm_pool": pool,
        "timm_proj": None,
        "image_size": size,
        **fields,
    }


def _hugging_face(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    text = {
        "hf_tokenizer_name": "here",
        "context_length": 16,
        "hf_pooler_type": "mean_pooler",
        **fields,
    }
    return {"model": {"pad_token_id": 1, "vocab_size": 320, **config}, **text}


@dataclass(frozen=True)
class Family:
    """The parts of a small model of a family."""

    names: str  # models of open_clip that belong to it
    image: dict[str, Any] = field(default_factory=lambda: dict(IMAGE))
    # `model` in it is the configuration of a Hugging Face model.
    text: dict[str, Any] = field(default_factory=lambda: dict(TEXT))
    config: dict[str, Any] = field(default_factory=dict)  # the rest of `model_cfg`
    preprocess: dict[str, Any] = field(default_factory=dict)  # where it is not CLIP's
    partial: bool = False  # only its text tower can be adapted


CUSTOM = {"custom_text": True}
SIGLIP = {"custom_text": True, "init_logit_bias": -10}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}

FAMILIES = {
    "vit": Family("ViT-B-32, ViT-B-16, ViT-L-14, ViT-L-14-336, ViT-H-14"),
    "vit-quickgelu": Family("ViT-B-32-quickgelu", config={"quick_gelu": True}),
    "vit-layer-scale": Family("ViT with ls_init_value", {**IMAGE, "ls_init_value": 0.5}),
    "vit-custom-blocks": Family(
        "ViT with block_type custom",
        {**IMAGE, "block_type": "custom", "qk_norm": True, "scale_heads": True},
    ),
    "clipa": Family(
        "ViT-L-14-CLIPA",
        {**IMAGE, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {
            **SHORT_TEXT,
            "tokenizer_kwargs": {"strip_sep_token": True},
            "pool_type": "last",
            "no_causal_mask": True,
        },
        preprocess=HALF,
    ),
    "coca": Family(
        "coca_ViT-B-32",
        {**IMAGE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        {**CUSTOM, "multimodal_cfg": {**TEXT, "context_length": 76, "attn_pooler_heads": 2}},
    ),
    "siglip": Family(
        "ViT-B-16-SigLIP",
        _timm("vit_small_patch16_siglip_32", pool="map", timm_proj="none"),
        {**SIGLIP_TEXT, "width": 64},
        SIGLIP,
        {**HALF, "interpolation": "bicubic"},
    ),
    "siglip2": Family(
        "ViT-B-16-SigLIP2, ViT-B-16-SigLIP2-256",
        _timm("vit_small_patch16_siglip_32", pool="map", timm_proj="none"),
        {**SIGLIP_TEXT, "width": 64, "act_kwargs": {"approximate": "tanh"}},
        SIGLIP,
        {**HALF, "interpolation": "bilinear"},
    ),
    "siglip2-b-32": Family(
        "ViT-B-32-SigLIP2-256",
        _timm("vit_small_patch32_siglip_64", 64, pool="map", timm_proj="none"),
        {**SIGLIP_TEXT, "width": 64, "act_kwargs": {"approximate": "tanh"}},
        SIGLIP,
        {**HALF, "interpolation": "bilinear"},
    ),
    "mobileclip-b": Family(
        "MobileCLIP-B, MobileCLIP2-B", _timm("small_mobileclip_b"), config=CUSTOM
    ),
    "mobileclip2-l": Family(
        "MobileCLIP2-L-14",
        _timm("small_mobileclip2_l"),
        {**TEXT, "no_causal_mask": True},
        CUSTOM,
    ),
    "vitamin": Family(
        "ViTamin-B, ViTamin-L",
        _timm("small_vitamin", pool="", timm_proj="linear", timm_drop_path=0.1),
        config=CUSTOM,
    ),
    "eva02": Family("EVA02-B-16", _timm("small_eva02"), config=CUSTOM),
    "pe-core": Family(
        "PE-Core-B-16",
        _timm("small_pe_core", pool="map"),
        {**TEXT, "context_length": 32},
        CUSTOM,
        HALF,
    ),
    "roberta": Family("roberta-ViT-B-32", text=_hugging_face({"model_type": "roberta", **ROBERTA})),
    "xlm-roberta": Family(
        "xlm-roberta-base-ViT-B-32", text=_hugging_face({"model_type": "xlm-roberta", **ROBERTA})
    ),
    "bert": Family(
        "BERT", text=_hugging_face({"model_type": "bert", **BERT}, hf_pooler_type="cls_pooler")
    ),
    "mt5": Family("mt5-base-ViT-B-32", text=_hugging_face({"model_type": "mt5", **MT5})),
    "nllb": Family(
        "nllb-clip-base",
        text=_hugging_face(
            {"model_type": "m2m_100", **M2M}, hf_pooler_type="cls_pooler", hf_proj_type="linear"
        ),
    ),
    "resnet": Family(
        "RN50, RN101",
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        partial=True,
    ),
    "mobileclip-s": Family(
        "MobileCLIP-S1",
        _timm("small_mobileclip_s", 64, "avg"),
        {**TEXT, "no_causal_mask": True},
        CUSTOM,
        partial=True,
    ),
}


def make_base(family: str, folder: Path, **model_cfg: Any) -> str:
    """Write a small model of a family, none of its weights zero or equal; gives its `local-dir:`
    name.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file

    _register()
    family_config = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    text = dict(family_config.text)
    if "model" in text:
        text["hf_model_name"] = str(folder / "text")
        (folder / "text").mkdir()
        (folder / "text" / "config.json").write_text(
            json.dumps(text.pop("model")), encoding="utf-8"
        )
    if "hf_tokenizer_name" in text:
        _tokenizer().save_pretrained(folder)
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    config = {
        # Without a projection it is the tower's own width.
        "embed_dim": 64 if family_config.image.get("timm_proj") == "none" else 32,
        "vision_cfg": family_config.image,
        "text_cfg": text,
        **family_config.config,
        **model_cfg,
    }
    config = {
        "model_cfg": config,
        "preprocess_cfg": {**preprocess, "resize_mode": "shortest", **family_config.preprocess},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:  # large enough for embeddings that differ from input to input
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.1)
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return name


def random_adapter(
    name: str,
    scale: float = 0.1,
    *,
    adapt: Adapt = "towers",
    partial: bool = False,
    **metadata: Any,
) -> Adapter:
    """An adapter of random values for a model: their standard deviation, their place, and fields of
    its metadata.
    """
    import torch

    from radapter_serve.adapter import Metadata, attach, base_digest
    from radapter_serve.clip.base import load_base

    base = load_base(name)
    weights = base.model.state_dict()
    adapters = attach(base.model, metadata.get("rank"), adapt=adapt, partial=partial)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapters.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    digest = base_digest(weights, [site.key for site in adapters.sites])
    return adapters.adapter(Metadata(architecture=name, base_digest=digest, **metadata))


def preprocess(size: int, interpolation: str = "bicubic", mode: Any = "shortest") -> Any:
    """Facts of a release about images, with a mode of resizing."""
    from radapter_serve.contract.facts import PreprocessFacts

    return PreprocessFacts(size, "RGB", interpolation, mode, 0, [0.5] * 3, [0.25] * 3, True)


def release(version: int = 1, **changes: Any) -> Release:
    """Facts of a release that nothing stands behind."""
    from radapter_serve.contract.facts import TokenizerFacts
    from radapter_serve.release.agreement import Agreements
    from radapter_serve.release.release import Release, Tower

    facts: dict[str, Any] = {
        "architecture": "ViT-B-32",
        "alpha": 0.5,
        "base_digest": "sha256:1",
        "adapter_digest": "sha256:2",
        "image_tower": Tower("sha256:1", "sha256:2"),
        "text_tower": Tower("sha256:4", "sha256:5"),
        "preprocess": preprocess(32),
        "tokenizer": TokenizerFacts(
            kind="clip",
            start=1,
            end=2,
            pad=0,
            clean="lower",
            digest="sha256:3",
            context_length=77,
            dynamic_length=True,
        ),
        "embed_dim": 32,
        "logit_scale": 100.0,
        "templates": ["a photo of a {}."],
        "agreement": Agreements(batches=[1], tolerance=1e-4, min_cosine=0.999999),
    }
    return Release(version=version, **{**facts, **changes})


def _register() -> None:
    """Towers of timm in small: the very functions that make the large ones, with other numbers."""
    from timm.models import (
        eva,
        fastvit,
        is_model,
        register_model,
        vision_transformer,
        vision_transformer_hybrid,
        vitamin,
    )

    small = {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 2}
    stages = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}
    stem = vitamin.VitCfg(
        embed_dim=(16, 32, 64),
        depths=(1, 1, 1),
        stem_width=16,
        conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
    makers = {
        "vit_small_patch16_siglip_32": (vision_transformer.vit_base_patch16_siglip_224, small),
        "vit_small_patch32_siglip_64": (
            vision_transformer.vit_base_patch32_siglip_256,
            small | {"img_size": 64},
        ),
        "small_mobileclip_b": (
            vision_transformer_hybrid.vit_base_mci_224,
            {"img_size": 32, "depth": 1},
        ),
        "small_mobileclip2_l": (
            vision_transformer.vit_large_patch14_clip_224,
            small | {"patch_size": 16},
        ),
        "small_vitamin": (vitamin.vitamin_base_224, {**small, "embed_cfg": stem}),
        "small_eva02": (eva.eva02_base_patch16_clip_224, small),
        "small_pe_core": (eva.vit_pe_core_tiny_patch16_384, {**small, "attn_pool_num_heads": 2}),
        "small_mobileclip_s": (fastvit.fastvit_mci0, stages),
    }
    for name, (maker, numbers) in makers.items():
        if is_model(name):
            continue

        def make(
            pretrained: bool = False, maker: Any = maker, numbers: Any = numbers, **fields: Any
        ) -> Any:
            return maker(pretrained, **numbers, **fields)

        make.__name__ = name
        register_model(make)


def _tokenizer() -> Any:
    """Bytes as tokens, as Hugging Face's fast tokenizers are kept: <s> 0, <pad> 1, </s> 2."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])
    }
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, sep_token="</s>", **special)
