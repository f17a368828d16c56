"""CLIPs in the form of the library `transformers`: `CLIPModel`, and `SiglipModel` for SigLIP.

A map gives the library's name of each weight of open_clip. Differences that a map can't express,
such as in pooling, activations and resizing, are found with a comparison of the outputs: a model
that differs is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tokenizers
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, _clean_canonicalize, _clean_lower
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from timm.layers.activations import GELUTanh
from torch import Tensor, nn

from radapter_serve import errors
from radapter_serve.clip.towers import encode_image, text_tower
from radapter_serve.errors import RAdapterError, check_installed, reason, short

#: special tokens by their names in open_clip's tokenizer, with their names in `transformers`
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
NAFLEX = (
    "a NaFlex model, which takes images of any shape; allowed is a SigLIP 2 of one size, such as"
    " ViT-B-16-SigLIP2-256, in transformers google/siglip2-base-patch16-256"
)
_CLASSES = {"clip": ("CLIPConfig", "CLIPModel"), "siglip": ("SiglipConfig", "SiglipModel")}
# Largest difference of a pixel, of 255: transformers resizes with torchvision, open_clip with
# Pillow.
_LEVELS = 3
# Largest difference of a component of unit-length embeddings.
_MAX_ERROR = 1e-4
# Of a SigLIP that is read: timm computes GELU exactly where transformers approximates it with tanh.
_MAX_ERROR_OF_GELU = 1e-3
_TEXTS = ["a photo of a cat.", "Don't  KNOW: it's 12345 l'été ÉÈ 猫 😀!!", "", "many words " * 60]

# Names of tensors, and below them names of layers, which have `weight` and `bias` in both.
_TEXT = {"positional_embedding": "text_model.embeddings.position_embedding.weight"}
_TEXT_LAYERS = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_POOL = "visual.trunk.attn_pool"
_TENSORS = {
    "clip": {
        **_TEXT,
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight",
        "text_projection.weight": "text_projection.weight",  # if it is a linear layer
    },
    "siglip": {
        **_TEXT,
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
        f"{_POOL}.latent": "vision_model.head.probe",
        # timm has a separate layer for queries; in transformers they share the layer of keys and
        # values.
        f"{_POOL}.q.weight": "vision_model.head.attention.in_proj_weight",
        f"{_POOL}.q.bias": "vision_model.head.attention.in_proj_bias",
        f"{_POOL}.kv.weight": "vision_model.head.attention.in_proj_weight",
        f"{_POOL}.kv.bias": "vision_model.head.attention.in_proj_bias",
    },
}
_LAYERS = {
    "clip": {
        **_TEXT_LAYERS,
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # with this typo
        "visual.ln_post": "vision_model.post_layernorm",
    },
    "siglip": {
        **_TEXT_LAYERS,
        "text_projection": "text_model.head",
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "visual.trunk.norm": "vision_model.post_layernorm",
        f"{_POOL}.norm": "vision_model.head.layernorm",
        f"{_POOL}.proj": "vision_model.head.attention.out_proj",
        f"{_POOL}.mlp.fc1": "vision_model.head.mlp.fc1",
        f"{_POOL}.mlp.fc2": "vision_model.head.mlp.fc2",
    },
}
# A tensor of a block: of open_clip's towers, or of timm's image tower.
_IN_A_BLOCK = re.compile(
    r"(visual\.)?(?:transformer\.resblocks|trunk\.blocks)\.(\d+)\.(.+)[._](weight|bias)"
)
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    # names of timm
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TRANSPOSED = ("visual.proj", "text_projection")


@dataclass(frozen=True)
class Form:
    """The form of a model in `transformers`: its kind, `clip` or `siglip`, the fields of its
    configuration, and the library's name of each open_clip weight, or names if it splits the
    weight.
    """

    kind: str
    config: dict[str, Any]
    names: dict[str, tuple[str, ...]]

    @property
    def classes(self) -> tuple[Any, Any]:
        """The library's classes of the configuration and of the model."""
        import transformers

        config, model = _CLASSES[self.kind]
        return getattr(transformers, config), getattr(transformers, model)


def form_of(name: str, model: Any, tokenizer: Any) -> Form:
    """The form of an open_clip model, from its modules and their names; `name` is for the error."""
    trunk = getattr(model.visual, "trunk", None)
    is_siglip = isinstance(model.visual, TimmModel) and hasattr(trunk, "attn_pool")
    kind = "siglip" if is_siglip else "clip"
    try:
        config = (_siglip_config if is_siglip else _clip_config)(model, tokenizer)
        names = {weight: _names_of(weight, kind) for weight in model.state_dict()}
        layers = [f"{layer}.weight" for layer in _LAYERS[kind].values()]
        needed = {*_TENSORS[kind].values(), *layers}
        if lacking := sorted(needed - {name for theirs in names.values() for name in theirs}):
            raise AttributeError(f"{lacking[0]} is a weight of only one of the two")
    except Exception as error:  # modules of other families lack these attributes
        raise RAdapterError(
            f"{name} has no form in transformers: it is not built as a {_CLASSES[kind][1]}"
            f" ({reason(error)})"
        ) from error
    return Form(kind, config, names)


def _names_of(name: str, kind: str) -> tuple[str, ...]:
    """The names in `transformers` of a weight of open_clip."""
    inner = name.removeprefix("text.")
    if inner in _TENSORS[kind]:
        return (_TENSORS[kind][inner],)
    layer, _, part = inner.rpartition(".")
    if layer in _LAYERS[kind]:
        return (f"{_LAYERS[kind][layer]}.{part}",)
    if match := _IN_A_BLOCK.fullmatch(inner):
        is_image, number, layer, part = match.groups()
        block = f"{'vision' if is_image else 'text'}_model.encoder.layers.{number}"
        if layer in ("attn.in_proj", "attn.qkv"):  # queries, keys and values
            return tuple(f"{block}.self_attn.{letter}_proj.{part}" for letter in "qkv")
        if layer in _BLOCK:
            return (f"{block}.{_BLOCK[layer]}.{part}",)
    raise AttributeError(f"{name} is a weight of only one of the two")


def _tower_config(tower: Any, norm: Any) -> dict[str, Any]:
    """Configuration fields of one of open_clip's towers."""
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": norm.eps,
    }


def _activation(layer: nn.Module) -> str:
    if isinstance(layer, QuickGELU):
        return "quick_gelu"
    if isinstance(layer, GELUTanh):
        return "gelu_pytorch_tanh"
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_pytorch_tanh"
    raise AttributeError(f"its activation is {type(layer).__name__}")


def _clip_config(model: Any, tokenizer: Any) -> dict[str, Any]:
    visual = model.visual
    text = text_tower(model)
    width = int(visual.proj.shape[1])
    return {
        "projection_dim": width,
        "logit_scale_init_value": float(model.logit_scale.detach()),
        "vision_config": {
            **_tower_config(visual, visual.ln_post),
            "image_size": int(visual.image_size[0]),
            "patch_size": int(visual.patch_size[0]),
            "projection_dim": width,
        },
        "text_config": {
            **_tower_config(text, text.ln_final),
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            "projection_dim": width,
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,
        },
    }


def _siglip_config(model: Any, tokenizer: Any) -> dict[str, Any]:
    trunk = model.visual.trunk
    text = text_tower(model)
    block = trunk.blocks[0]
    special = tokenizer.tokenizer
    return {
        "vision_config": {
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": int(trunk.patch_embed.img_size[0]),
            "patch_size": int(trunk.patch_embed.patch_size[0]),
            "hidden_act": _activation(block.mlp.act),
            "layer_norm_eps": block.norm1.eps,
        },
        "text_config": {
            **_tower_config(text, text.ln_final),
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            "projection_size": text.text_projection.out_features,
            "bos_token_id": special.bos_token_id,
            "eos_token_id": special.eos_token_id,
            "pad_token_id": special.pad_token_id,
        },
    }


def to_transformers(state_dict: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """Convert a state dict to the names of `transformers`, fp32."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, theirs in form.names.items():
        tensor = state_dict[name].detach().float()
        if name.startswith("logit_"):  # a scalar, of shape [1] for SigLIP
            tensor = tensor.reshape(() if form.kind == "clip" else 1)
        if name.endswith("pos_embed"):
            tensor = tensor.squeeze(0)
        if name.removeprefix("text.") in _TRANSPOSED:
            tensor = tensor.t()
        pieces = tensor.chunk(len(theirs)) if len(theirs) > 1 else [tensor]
        for their_name, piece in zip(theirs, pieces, strict=True):
            parts[their_name].append(piece.contiguous())
    return {
        name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in parts.items()
    }


def to_open_clip(
    tensors: Mapping[str, Tensor], form: Form, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert a state dict of `transformers`, of no other weights, to open_clip's names, fp32;
    `like` is open_clip's state dict, for the shapes.
    """
    sharing: dict[str, list[str]] = defaultdict(list)
    for name, theirs in form.names.items():
        for their_name in theirs:
            sharing[their_name].append(name)
    if missing := [name for name in sharing if name not in tensors]:
        raise RAdapterError(f"it has no weight {missing[0]}")
    if unknown := set(tensors) - set(sharing):
        kind = "CLIP" if form.kind == "clip" else "SigLIP"
        raise RAdapterError(f"it has the weight {min(unknown)}, which a {kind} has not")
    ours = {}
    for name, theirs in form.names.items():
        pieces = [tensors[their_name].detach().float() for their_name in theirs]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if len(names := sharing[theirs[0]]) > 1:  # take this layer's rows of a shared tensor
            parts = torch.split(tensor, [len(like[sharer]) for sharer in names])
            tensor = parts[names.index(name)]
        if name.removeprefix("text.") in _TRANSPOSED:
            tensor = tensor.t()
        if name.startswith("logit_") or name.endswith("pos_embed"):
            tensor = tensor.reshape(like[name].shape)
        ours[name] = tensor.contiguous()
    return ours


@torch.no_grad()
def check_outputs(theirs: Any, ours: Any, tokenizer: Any, max_error: float = _MAX_ERROR) -> None:
    """Refuse a model of `transformers` whose embeddings differ from those of open_clip's model."""
    size = ours.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = tokenizer(_TEXTS)
    unit = nn.functional.normalize
    for kind, expected, output in (
        ("image", encode_image(ours, pixels), theirs.get_image_features(pixel_values=pixels)),
        ("text", unit(ours.encode_text(tokens).float()), theirs.get_text_features(tokens)),
    ):
        apart = (unit(features(output).float()) - expected).abs().max()
        if not apart <= max_error:
            raise RAdapterError(
                f"its {kind} embeddings in transformers differ by {apart:.1e} from open_clip's"
            )


def features(output: Any) -> Tensor:
    """Embeddings from the output of `transformers`: a tensor up to version 4, an object later."""
    embeds: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embeds


def open_processor(folder: Path) -> tuple[Any, Any]:
    """Open the image processor and the tokenizer of a folder."""
    from transformers import AutoImageProcessor, AutoTokenizer

    images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
    return images, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_processor(
    processor: Any,
    theirs: Any,
    preprocess: Mapping[str, Any],
    tokenizer: Any,
    clean: Callable[[str], str] = str,
) -> None:
    """Refuse a processor or tokenizer of `open_processor` that differs from open_clip's; `clean`
    is what is done with texts before they are given to this tokenizer.
    """
    transform: Any = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    levels = 255 * np.array(preprocess["std"]).reshape(3, 1, 1)
    size = preprocess["size"]
    side = int(size if isinstance(size, int) else size[0])
    # Smooth images, upright, wide and square, with even margins, which both libraries crop alike.
    random = np.random.default_rng(0)
    for shape, target in (
        ((8, 6, 3), (side, side + 4)),
        ((6, 8, 3), (2 * side + 8, 2 * side)),
        ((6, 6, 3), (3 * side, 3 * side)),
    ):
        image = Image.fromarray(random.integers(0, 256, shape, np.uint8))
        image = image.resize(target, Image.Resampling.BICUBIC)
        expected = transform(image).numpy()
        values = np.asarray(processor(images=[image], return_tensors="pt")["pixel_values"][0])
        if values.shape != expected.shape:
            raise RAdapterError(
                f"its processor in transformers gives {values.shape}, and open_clip's"
                f" {expected.shape}"
            )
        apart = np.abs((values - expected) * levels).max()
        if not apart <= _LEVELS:
            raise RAdapterError(
                f"its processor in transformers differs by {apart:.1f} of 255 levels from"
                " open_clip's"
            )
    texts = [clean(text) for text in _TEXTS]
    rows = theirs(texts, padding="max_length", truncation=True, max_length=tokenizer.context_length)
    for text, ours, row in zip(_TEXTS, tokenizer(_TEXTS).tolist(), rows["input_ids"], strict=True):
        # CLIP reads nothing after the first end token, and the two tokenizers pad differently.
        is_clip = isinstance(tokenizer, SimpleTokenizer)
        length = ours.index(tokenizer.eot_token_id) + 1 if is_clip else len(ours)
        if ours[:length] != list(row[:length]):
            raise RAdapterError(
                f"its tokenizer in transformers reads {text[:40]!r} in another way than open_clip's"
            )


def read(folder: Path) -> tuple[nn.Module, dict[str, Any], Any]:
    """Read a folder with a `CLIPModel` or `SiglipModel` as an open_clip model in fp32, with
    open_clip's `model_cfg` and tokenizer; refuses one that open_clip computes differently.
    """
    check_installed("transformers", "huggingface")
    import transformers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "siglip2":
        raise RAdapterError(f"it is {NAFLEX}")
    if kind not in _CLASSES:
        raise RAdapterError(f"its model_type is {short(kind)}; allowed: {', '.join(_CLASSES)}")
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[kind])
    local: dict[str, Any] = {"local_files_only": True}
    with quiet():
        # Load the weights by name.
        theirs_config: Any = config_class.from_pretrained(folder, **local)
        theirs, info = model_class.from_pretrained(folder, output_loading_info=True, **local)
        if missing := sorted(info["missing_keys"]):  # the library fills them with random values
            raise RAdapterError(f"it has no weight {missing[0]}")
        processor, their_tokenizer = open_processor(folder)
        model: Any
        tokenizer: Any
        if kind == "clip":
            config = _open_clip_config(theirs_config)
            model = open_clip.CLIP(**config)
            tokenizer = SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
            names = {SPECIAL.get(token, token): index for token, index in tokenizer.encoder.items()}
            vocabulary = config["text_cfg"]["vocab_size"]
            if their_tokenizer.get_vocab() != names or vocabulary != len(names):
                raise RAdapterError("its vocabulary is not CLIP's")
        else:
            length = theirs_config.text_config.max_position_embeddings
            tokenizer = _siglip_tokenizer(folder, their_tokenizer, length)
            config = _open_clip_siglip(theirs_config, tokenizer)
            fields = {name: value for name, value in config.items() if name != "custom_text"}
            model = open_clip.CustomTextCLIP(**fields)
        form = form_of(folder.name, model, tokenizer)
        model.load_state_dict(to_open_clip(theirs.state_dict(), form, model.state_dict()))

        # Read the preprocessing.
        fields = processor.to_dict()
        size = fields.get("size") or {}
        is_squashed = not isinstance(size, int) and dict(size).get("height") is not None
        is_bilinear = int(fields.get("resample", 3)) == Image.Resampling.BILINEAR
        preprocess = {
            "size": model.visual.image_size,
            "mode": "RGB",
            "mean": list(fields["image_mean"]),
            "std": list(fields["image_std"]),
            "interpolation": "bilinear" if is_bilinear else "bicubic",
            "resize_mode": "squash" if is_squashed else "shortest",
            "fill_color": 0,
        }
        set_model_preprocess_cfg(model, preprocess)

        # Check everything else with its outputs.
        theirs = theirs.float().eval()
        if kind == "clip":
            check_processor(processor, their_tokenizer, preprocess, tokenizer)
            check_outputs(theirs, model.eval(), tokenizer)
        else:
            clean = tokenizer.clean_fn
            check_processor(processor, their_tokenizer, preprocess, tokenizer, clean)
            check_outputs(theirs, model.eval(), tokenizer, _MAX_ERROR_OF_GELU)
    return model, config, tokenizer


def _tower_fields(part: Any) -> dict[str, Any]:
    """open_clip's fields of a tower for its configuration in `transformers`."""
    fields = {
        "width": part.hidden_size,
        "layers": part.num_hidden_layers,
        "mlp_ratio": part.intermediate_size / part.hidden_size,
    }
    if part.layer_norm_eps != 1e-5:
        fields["norm_kwargs"] = {"eps": part.layer_norm_eps}
    if part.hidden_act == "gelu_pytorch_tanh":
        fields["act_kwargs"] = {"approximate": "tanh"}
    return fields


def _open_clip_config(config: Any) -> dict[str, Any]:
    """open_clip's `model_cfg` for a `CLIPConfig`."""
    image = config.vision_config
    text = config.text_config
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": image.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "head_width": image.hidden_size // image.num_attention_heads,
            **_tower_fields(image),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_tower_fields(text),
        },
    }


def _open_clip_siglip(config: Any, tokenizer: HFTokenizer) -> dict[str, Any]:
    """open_clip's `model_cfg` for a `SiglipConfig`."""
    import timm

    # Find the image tower in timm, where the name says the sizes.
    image = config.vision_config
    side = image.image_size
    patch = image.patch_size
    sizes = [image.hidden_size, image.num_hidden_layers, image.num_attention_heads]
    sizes.append(image.intermediate_size)
    tower = None
    for name in sorted(timm.list_models(f"vit_*_patch{patch}_siglip*_{side}"), key=len):
        with torch.device("meta"):
            trunk: Any = timm.create_model(name, num_classes=0, global_pool="map")
        block = trunk.blocks[0]
        heads = block.attn.num_heads
        if sizes == [trunk.embed_dim, len(trunk.blocks), heads, block.mlp.fc1.out_features]:
            tower = name
            break
    if tower is None:
        raise RAdapterError(
            f"timm has no SigLIP for images of {side} pixels with patches of {patch}, width"
            f" {sizes[0]}, {sizes[1]} layers and {sizes[2]} heads"
        )

    text = config.text_config
    clean = "canonicalize" if tokenizer.clean_fn is _clean_canonicalize else "lower"
    return {
        "embed_dim": text.projection_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": side,
            "timm_model_name": tower,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": "of its folder",
            "tokenizer_kwargs": {"clean": clean},
            "heads": text.num_attention_heads,
            **_tower_fields(text),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def _siglip_tokenizer(folder: Path, theirs: Any, length: int) -> HFTokenizer:
    """open_clip's tokenizer for a SigLIP's in `transformers`. Texts are cleaned as open_clip cleans
    them for SigLIP, to lower case without punctuation, if the library's tokenizer does so. Another,
    such as SigLIP 2's, gets texts in lower case: it was trained with them, though its tokenizer in
    the library keeps capitals.
    """
    tokenizer = HFTokenizer(str(folder), length, clean="canonicalize", local_files_only=True)
    cleaned = [_clean_canonicalize(text) for text in _TEXTS]
    if theirs(_TEXTS)["input_ids"] != theirs(cleaned)["input_ids"]:
        tokenizer.clean_fn = _clean_lower
    if theirs.is_fast:
        return tokenizer

    # A release needs the form of the library tokenizers: take its file, or convert the
    # SentencePiece model. `check_processor` compares the two.
    import transformers

    path = folder / "tokenizer.json"
    core = tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else _of_pieces(theirs)
    special = {name: str(token) for name, token in theirs.special_tokens_map.items()}
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer.tokenizer = fast(tokenizer_object=core, **special)
    return tokenizer


def _of_pieces(theirs: Any) -> tokenizers.Tokenizer:
    """Convert a tokenizer of SentencePiece, with pieces and scores of a unigram model."""
    # Not sentencepiece's own description of its file, which asks for the newest protobuf.
    from transformers.utils import sentencepiece_model_pb2_new as description

    form: Any = description
    pieces = form.ModelProto.FromString(theirs.sp_model.serialized_model_proto())
    scored = [(piece.piece, piece.score) for piece in pieces.pieces]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(scored, pieces.trainer_spec.unk_id))
    if charsmap := pieces.normalizer_spec.precompiled_charsmap:
        core.normalizer = tokenizers.normalizers.Precompiled(charsmap)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Metaspace(),
        ]
    )
    end = (theirs.eos_token, theirs.eos_token_id)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    return core


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the logs and warnings of `transformers`, and its progress bar for weights."""
    from transformers.utils import logging

    is_shown = logging.is_progress_bar_enabled()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with errors.quiet():
            yield
    finally:
        if is_shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
