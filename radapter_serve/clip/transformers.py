"""CLIPs in the form of the library `transformers`: `CLIPModel`, and for SigLIPs `SiglipModel`.

A map of names says what the library calls each weight of open_clip's. What a map can't say, such as
pooling, activations and how images are resized, is found out by a comparison of the outputs: a
model that differs is refused.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn

from radapter_serve.clip.towers import encode_image, text_tower
from radapter_serve.errors import RAdapterError, check_installed, reason, short

#: what open_clip's tokenizer and that of `transformers` call the same tokens
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
_CLASSES = {"clip": ("CLIPConfig", "CLIPModel"), "siglip": ("SiglipConfig", "SiglipModel")}
_KINDS = ("weight", "bias")
# Of 255, that a pixel may differ: transformers resizes by torchvision, open_clip by Pillow.
_LEVELS = 3
_MAX_ERROR = 1e-4  # of a component of the unit-length embeddings
_TEXTS = ["a photo of a cat.", "Don't  KNOW: it's 12345 l'été ÉÈ 猫 😀!!", "", "many words " * 60]

# The names of a block's layers in open_clip's towers, in timm's, and in the pooling of SigLIP's.
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
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


@dataclass(frozen=True)
class Weight:
    """A tensor in both libraries, or several that share it along its first axis."""

    ours: tuple[str, ...]  # names in open_clip's state dict
    theirs: tuple[str, ...]  # names in that of `transformers`
    transposed: bool = False
    shape: tuple[int, ...] | None = None  # theirs, where it has other axes of length one


@dataclass(frozen=True)
class Form:
    """A model as `transformers` has it: `clip` or `siglip`, the fields of its configuration, and
    its weights.
    """

    kind: str
    config: dict[str, Any]
    weights: list[Weight]

    @property
    def config_class(self) -> Any:
        """The library's class of the configuration."""
        import transformers

        return getattr(transformers, _CLASSES[self.kind][0])

    @property
    def model_class(self) -> Any:
        """The library's class of the model."""
        import transformers

        return getattr(transformers, _CLASSES[self.kind][1])


def form_of(name: str, model: Any, tokenizer: Any) -> Form:
    """The form of an open_clip model by its modules and their names; `name` is for the error.

    Whether the library computes the same is for `check_outputs` to say.
    """
    trunk = getattr(model.visual, "trunk", None)
    is_siglip = isinstance(model.visual, TimmModel) and hasattr(trunk, "attn_pool")
    try:
        form = _siglip_form(model, tokenizer) if is_siglip else _clip_form(model, tokenizer)
        mapped = {name for weight in form.weights for name in weight.ours}
        if extra := sorted(set(model.state_dict()) ^ mapped):
            raise AttributeError(f"{extra[0]} is a weight of one of the two alone")
    except Exception as error:  # modules of other families lack what the map asks for
        kind = _CLASSES["siglip" if is_siglip else "clip"][1]
        raise RAdapterError(
            f"{name} has no form in transformers: it is not built as a {kind} ({reason(error)})"
        ) from error
    return form


def _pairs(ours: str, theirs: str, layers: Mapping[str, str] | None = None) -> list[Weight]:
    """Weight and bias of one layer, or of each of a block's layers."""
    if layers is not None:
        names = [(f"{ours}.{one}", f"{theirs}.{other}") for one, other in layers.items()]
        return [weight for pair in names for weight in _pairs(*pair)]
    return [Weight((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for kind in _KINDS]


def _projections(ours: str, theirs: str) -> list[Weight]:
    """Queries, keys and values, which are one tensor in open_clip and timm; `ours` has a place for
    weight or bias.
    """
    return [
        Weight((ours.format(kind),), tuple(f"{theirs}.{part}_proj.{kind}" for part in "qkv"))
        for kind in _KINDS
    ]


def _blocks(ours: str, theirs: str, count: int) -> list[Weight]:
    """The weights of the blocks of one of open_clip's towers."""
    weights = []
    for number in range(count):
        block = f"{ours}.resblocks.{number}"
        layer = f"{theirs}.encoder.layers.{number}"
        weights += _projections(f"{block}.attn.in_proj_{{}}", f"{layer}.self_attn")
        weights += _pairs(block, layer, _BLOCK)
    return weights


def _text_weights(text: Any, prefix: str) -> list[Weight]:
    """The weights of one of open_clip's text towers, but for its projection."""
    theirs = "text_model"
    embeddings = f"{theirs}.embeddings"
    return [
        Weight((f"{prefix}positional_embedding",), (f"{embeddings}.position_embedding.weight",)),
        Weight((f"{prefix}token_embedding.weight",), (f"{embeddings}.token_embedding.weight",)),
        *_pairs(f"{prefix}ln_final", f"{theirs}.final_layer_norm"),
        *_blocks(f"{prefix}transformer", theirs, len(text.transformer.resblocks)),
    ]


def _tower_config(tower: Any, norm: Any) -> dict[str, Any]:
    """The numbers of one of open_clip's towers."""
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
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_pytorch_tanh"
    raise AttributeError(f"its activation is {type(layer).__name__}")


def _clip_form(model: Any, tokenizer: Any) -> Form:
    visual = model.visual
    text = text_tower(model)
    width = int(visual.proj.shape[1])
    config = {
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
    prefix = "" if text is model else "text."
    is_linear = isinstance(text.text_projection, nn.Linear)
    projection = f"{prefix}text_projection{'.weight' if is_linear else ''}"
    image = "vision_model"
    embeddings = f"{image}.embeddings"
    weights = [
        Weight(("logit_scale",), ("logit_scale",), shape=()),
        Weight(("visual.class_embedding",), (f"{embeddings}.class_embedding",)),
        Weight(("visual.positional_embedding",), (f"{embeddings}.position_embedding.weight",)),
        Weight(("visual.conv1.weight",), (f"{embeddings}.patch_embedding.weight",)),
        *_pairs("visual.ln_pre", f"{image}.pre_layrnorm"),  # its name has this slip
        *_pairs("visual.ln_post", f"{image}.post_layernorm"),
        Weight(("visual.proj",), ("visual_projection.weight",), transposed=True),
        *_blocks("visual.transformer", image, len(visual.transformer.resblocks)),
        *_text_weights(text, prefix),
        Weight((projection,), ("text_projection.weight",), transposed=not is_linear),
    ]
    return Form("clip", config, weights)


def _siglip_form(model: Any, tokenizer: Any) -> Form:
    trunk = model.visual.trunk
    text = text_tower(model)
    block = trunk.blocks[0]
    special = tokenizer.tokenizer
    config = {
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
    ours = "visual.trunk"
    theirs = "vision_model"
    pool = f"{ours}.attn_pool"
    head = f"{theirs}.head"
    places = tuple(trunk.pos_embed.shape[1:])
    position = f"{theirs}.embeddings.position_embedding.weight"
    weights = [
        Weight(("logit_scale",), ("logit_scale",), shape=(1,)),
        Weight(("logit_bias",), ("logit_bias",), shape=(1,)),
        Weight((f"{ours}.pos_embed",), (position,), shape=places),
        *_pairs(f"{ours}.patch_embed.proj", f"{theirs}.embeddings.patch_embedding"),
        *_pairs(f"{ours}.norm", f"{theirs}.post_layernorm"),
        Weight((f"{pool}.latent",), (f"{head}.probe",)),
        *_pairs(pool, head, _POOL),
        *_text_weights(text, "text."),
        *_pairs("text.text_projection", "text_model.head"),
    ]
    # The pooling's queries have a layer by themselves in timm, and share one with keys and values
    # there.
    for kind in _KINDS:
        names = (f"{pool}.q.{kind}", f"{pool}.kv.{kind}")
        weights.append(Weight(names, (f"{head}.attention.in_proj_{kind}",)))
    for number in range(len(trunk.blocks)):
        layer = f"{theirs}.encoder.layers.{number}"
        weights += _projections(f"{ours}.blocks.{number}.attn.qkv.{{}}", f"{layer}.self_attn")
        weights += _pairs(f"{ours}.blocks.{number}", layer, _TIMM_BLOCK)
    return Form("siglip", config, weights)


def to_transformers(
    state_dict: Mapping[str, Tensor], weights: Iterable[Weight]
) -> dict[str, Tensor]:
    """A state dict by the names of `transformers`, fp32."""
    theirs: dict[str, Tensor] = {}
    for weight in weights:
        tensor = _joined([state_dict[name] for name in weight.ours])
        if weight.shape is not None:
            tensor = tensor.reshape(weight.shape)
        if weight.transposed:
            tensor = tensor.t()
        parts = tensor.chunk(len(weight.theirs)) if len(weight.theirs) > 1 else [tensor]
        for name, part in zip(weight.theirs, parts, strict=True):
            theirs[name] = part.contiguous()
    return theirs


def to_open_clip(tensors: Mapping[str, Tensor], weights: Iterable[Weight]) -> dict[str, Tensor]:
    """A state dict of a `CLIPModel` by the names of open_clip, fp32; refuses missing and unknown
    weights.
    """
    ours = {}
    rest = set(tensors)
    for weight in weights:
        if missing := [name for name in weight.theirs if name not in tensors]:
            raise RAdapterError(f"it has no weight {missing[0]}")
        rest -= set(weight.theirs)
        tensor = _joined([tensors[name] for name in weight.theirs])
        (name,) = weight.ours
        ours[name] = tensor.t().contiguous() if weight.transposed else tensor
    if rest:
        raise RAdapterError(f"it has the weight {min(rest)}, which a CLIP has not")
    return ours


def _joined(parts: list[Tensor]) -> Tensor:
    floats = [part.detach().float() for part in parts]
    return torch.cat(floats) if len(floats) > 1 else floats[0]


@torch.no_grad()
def check_outputs(theirs: Any, ours: Any, tokenizer: Any) -> None:
    """Refuse a model of `transformers` whose embeddings differ from those of open_clip's model.

    `theirs` is in eval mode, `tokenizer` open_clip's.
    """
    size = ours.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = tokenizer(_TEXTS)
    unit = nn.functional.normalize
    for kind, expected, found in (
        ("image", encode_image(ours, pixels), theirs.get_image_features(pixel_values=pixels)),
        ("text", unit(ours.encode_text(tokens).float()), theirs.get_text_features(tokens)),
    ):
        apart = (unit(features(found).float()) - expected).abs().max()
        if not apart <= _MAX_ERROR:
            raise RAdapterError(
                f"its {kind} embeddings in transformers differ by {apart:.1e} from open_clip's"
            )


def features(output: Any) -> Tensor:
    """Embeddings as all versions of `transformers` give them: a tensor up to 4, something that
    holds it from 5 on.
    """
    embeds: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embeds


def check_processor(folder: Path, preprocess: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse a folder whose processor or tokenizer differs from open_clip's, on images and texts.

    `preprocess` is open_clip's `preprocess_cfg`, and `tokenizer` its tokenizer.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
    transform: Any = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    levels = 255 * np.array(preprocess["std"]).reshape(3, 1, 1)
    size = preprocess["size"]
    side = int(size if isinstance(size, int) else size[0])
    # Smooth images, upright, wide and square; their margins are even, where all crop alike.
    random = np.random.default_rng(0)
    for shape, target in (
        ((8, 6, 3), (side, side + 4)),
        ((6, 8, 3), (2 * side + 8, 2 * side)),
        ((6, 6, 3), (3 * side, 3 * side)),
    ):
        image = Image.fromarray(random.integers(0, 256, shape, np.uint8))
        image = image.resize(target, Image.Resampling.BICUBIC)
        expected = transform(image).numpy()
        found = np.asarray(processor(images=[image], return_tensors="pt")["pixel_values"][0])
        if found.shape != expected.shape:
            raise RAdapterError(
                f"its processor in transformers gives {found.shape}, and open_clip's"
                f" {expected.shape}"
            )
        apart = np.abs((found - expected) * levels).max()
        if not apart <= _LEVELS:
            raise RAdapterError(
                f"its processor in transformers differs by {apart:.1f} of 255 levels from"
                " open_clip's"
            )
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = theirs(
        _TEXTS, padding="max_length", truncation=True, max_length=tokenizer.context_length
    )
    for text, ours, row in zip(_TEXTS, tokenizer(_TEXTS).tolist(), rows["input_ids"], strict=True):
        # CLIP reads nothing after the first end token, and each tokenizer pads with another token.
        is_clip = isinstance(tokenizer, SimpleTokenizer)
        length = ours.index(tokenizer.eot_token_id) + 1 if is_clip else len(ours)
        if ours[:length] != list(row[:length]):
            raise RAdapterError(
                f"its tokenizer in transformers reads {text[:40]!r} in another way than open_clip's"
            )


def is_transformers(folder: Path) -> bool:
    """True for a folder with a model in this form, and none in open_clip's."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def read(folder: Path) -> tuple[nn.Module, dict[str, Any], SimpleTokenizer]:
    """Read a `CLIPModel` as a model of open_clip's in fp32, with open_clip's `model_cfg` and
    tokenizer.

    The folder holds `config.json`, weights, `preprocessor_config.json` (or `processor_config.json`)
    and a tokenizer. Refuses what is not a CLIP, and what open_clip computes otherwise.
    """
    check_installed("transformers", "huggingface")
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise RAdapterError(f"its model_type is {short(kind)}; allowed: clip")
    local: dict[str, Any] = {"local_files_only": True}
    with quiet():
        # Weights, by their names.
        theirs_config: Any = CLIPConfig.from_pretrained(folder, **local)
        config = _open_clip_config(theirs_config)
        loaded: Any = CLIPModel.from_pretrained(folder, output_loading_info=True, **local)
        theirs, info = loaded
        if missing := sorted(info["missing_keys"]):  # which the library fills with random values
            raise RAdapterError(f"it has no weight {missing[0]}")
        model = open_clip.CLIP(**config)
        tokenizer = SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        form = _clip_form(model, tokenizer)
        model.load_state_dict(to_open_clip(theirs.state_dict(), form.weights))

        # Vocabulary and preprocessing.
        names = {SPECIAL.get(token, token): index for token, index in tokenizer.encoder.items()}
        vocabulary = AutoTokenizer.from_pretrained(folder, **local).get_vocab()
        if vocabulary != names or config["text_cfg"]["vocab_size"] != len(names):
            raise RAdapterError("its vocabulary is not CLIP's")
        processor: Any = AutoImageProcessor.from_pretrained(folder, **local)  # type: ignore[no-untyped-call]
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

        # The rest by what comes out.
        check_processor(folder, preprocess, tokenizer)
        check_outputs(theirs.float().eval(), model.eval(), tokenizer)
    return model, config, tokenizer


def _open_clip_config(config: Any) -> dict[str, Any]:
    """open_clip's `model_cfg` of a model that a `CLIPConfig` describes."""
    image = config.vision_config
    text = config.text_config

    def tower(part: Any) -> dict[str, Any]:
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

    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": image.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "head_width": image.hidden_size // image.num_attention_heads,
            **tower(image),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **tower(text),
        },
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """`transformers` logs, warns its own callers, and draws a bar for the weights that it loads."""
    from transformers.utils import logging as library

    logging: Any = library  # whose functions have no types
    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
