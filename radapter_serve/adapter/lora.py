"""LoRA of the library `peft` for a `CLIPModel` of `transformers`, merged into open_clip's weights.

The folder is not trusted, so it is read here and not by peft, which imports a module that the
configuration names, allocates the rank that it says, and matches its regular expressions.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from radapter_serve.adapter.line import Line, Tuned, check_weights, plain_values, weights_of
from radapter_serve.clip.base import load_base, split_name
from radapter_serve.clip.transformers import form_of, to_open_clip, to_transformers
from radapter_serve.errors import RAdapterError, reason, short
from radapter_serve.files import digest_of
from radapter_serve.sources import HUB, LOCAL

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Fields that change nothing of what is merged, or that are read below. Any other must be off.
_KNOWN = (
    *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
    "init_lora_weights",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # which leave the base as it is
_LAYER = re.compile(r"(?:base_model\.model\.)?([\w.]+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[\w.]+")


def load_lora(folder: str | Path, base: str | None = None, pretrained: str | None = None) -> Tuned:
    """Load a LoRA and its base; the tuned weights are the base's with the LoRA merged.

    `base` is named as `load_base` takes it, or `NAME:TAG`; None for the one that the folder names.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    layers = _read_layers(folder, config)

    # The base.
    if base is None:
        name = str(config.get("base_model_name_or_path") or "")
        if not name:
            raise RAdapterError(
                f"{folder} does not say what it was trained on; name it with --base, such as --base"
                " hf-hub:openai/clip-vit-base-patch32"
            )
        base = f"{LOCAL}{name}" if Path(name).is_dir() else f"{HUB}{name}"
    start = load_base(*split_name(base, pretrained))
    form = form_of(base, start.model, start.tokenizer)
    if form.kind != "clip":
        raise RAdapterError(f"{base} is not a CLIPModel in transformers; --lora takes those alone")
    weights = weights_of(start)

    # The merge, layer by layer in the names of transformers: W + scale·B·A, as peft computes it.
    theirs = to_transformers(weights, form)
    for name, (up, down, scale) in layers.items():
        weight = theirs.get(f"{name}.weight")
        if weight is None:
            raise RAdapterError(f"{folder} adapts the layer {name}, which {base} has not")
        shape = [len(up), down.shape[1]]
        if list(weight.shape) != shape:  # before a product that could fill the memory
            raise RAdapterError(
                f"{folder} is of another base than {base}: its change of {name} is {shape}, and"
                f" the layer's weight {list(weight.shape)}"
            )
        theirs[f"{name}.weight"] = weight + up @ down * scale
    merged = to_open_clip(theirs, form)
    shaped = {name: tensor.reshape(weights[name].shape) for name, tensor in merged.items()}
    made_of = {
        "kind": "lora",
        "name": folder.absolute().name,
        "base": f"{base}:{pretrained}" if pretrained else base,
        "digest": digest_of(folder / WEIGHTS),
    }
    tuned = check_weights(str(folder), {**weights, **shaped}, weights)
    return Tuned(start, Line(weights, tuned, made_of))


def _read_layers(folder: Path, config: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """lora_B [out, r] and lora_A [r, in] of each layer, fp32, and the factor of their product."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise RAdapterError(f"{folder} holds no {WEIGHTS}; save it with safe_serialization=True")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RAdapterError(f"could not read {path}: {reason(error)}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise RAdapterError(
                f"{path} has the tensor {short(name)}; allowed are lora_A and lora_B of linear"
                " layers: merge it by peft's merge_and_unload, and export that with --checkpoint"
            )
        values = plain_values(tensor, f"{path} is damaged: {name}")
        halves.setdefault(match[1], {})[match[2]] = values
    if not halves:
        raise RAdapterError(f"{path} holds no tensors")
    layers = {}
    for layer, half in halves.items():
        down = half.get("A")
        up = half.get("B")
        if down is None or up is None or len(down) != up.shape[1]:
            raise RAdapterError(f"{path} is damaged: lora_A and lora_B of {layer} do not fit")
        rank = int(_value_of(layer, config.get("rank_pattern"), config.get("r")))
        if rank != len(down):
            raise RAdapterError(
                f"{path} is damaged: {layer} has rank {len(down)}, and {rank} by {CONFIG}"
            )
        alpha = _value_of(layer, config.get("alpha_pattern"), config.get("lora_alpha"))
        layers[layer] = (up, down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return layers


def _value_of(layer: str, patterns: Any, default: Any) -> float:
    """The rank or alpha of a layer: that of the first pattern that is its name or the end of it."""
    value = default
    for pattern, own in (patterns or {}).items():
        if not _PATTERN.fullmatch(pattern):
            raise RAdapterError(
                f"{CONFIG} has the pattern {short(pattern)}; allowed are names of layers"
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            value = own
            break
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise RAdapterError(
            f"{CONFIG} has the rank or alpha {short(value)}; allowed: numbers above 0"
        )
    return float(value)


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration of a plain LoRA; refuses any other."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RAdapterError(
            f"{path.parent} is no folder of peft: could not read {path.name}: {reason(error)}"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise RAdapterError(f"{path} is of the kind {short(kind)}; allowed: LORA")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise RAdapterError(
            f"{path} has init_lora_weights {short(start)}, which changes the base itself;"
            " convert it by peft (path_initial_model_for_weight_conversion) first"
        )
    for name, value in config.items():
        if value and name not in _KNOWN and (name, value) != ("bias", "none"):
            raise RAdapterError(
                f"{path} has {short(name)} {short(value)}, which is more than a plain LoRA; merge"
                " it by peft's merge_and_unload, and export that with --checkpoint"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise RAdapterError(f"{path} has {name} {short(config[name])}; allowed: a table")
    return config
