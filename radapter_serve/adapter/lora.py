"""LoRA of the library `peft` for a `CLIPModel` of `transformers`, merged into open_clip's
weights.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from radapter_serve.adapter.line import Line, Tuned, check_weights, plain_values, weights_of
from radapter_serve.clip.base import load_base, split_name
from radapter_serve.clip.form import to_open_clip, to_transformers
from radapter_serve.clip.transformers_form import form_of
from radapter_serve.errors import RAdapterError, reason, short
from radapter_serve.files import digest_of
from radapter_serve.hub import HUB, LOCAL

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Fields that change nothing of what is merged, or that are read below. Any other must be off.
_KNOWN = (
    *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # which leave the base as it is
_LAYER = re.compile(r"(?:base_model\.model\.)?([\w.]+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class LoraLayer:
    """What is added to the weight of one layer: `scale·up·down`.

    Attributes:
        up: lora_B, float32 [out, r].
        down: lora_A, float32 [r, in].
        scale: factor of the product.
    """

    up: Tensor
    down: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The layer's weight, float32 [out, in], with the LoRA merged as `peft` merges it."""
        return weight + self.up @ self.down * self.scale


@dataclass(frozen=True)
class Lora:
    """What a folder of `peft` holds.

    Attributes:
        base: what it was trained on, by the name that the folder says; "" if it says none.
        layers: by their names in `transformers`.
    """

    base: str
    layers: dict[str, LoraLayer]


def load_lora(folder: str | Path, base: str | None = None, pretrained: str | None = None) -> Tuned:
    """Load a LoRA and its base; the tuned weights are the base's with the LoRA merged.

    Args:
        folder: of `peft`, with adapter_config.json and adapter_model.safetensors.
        base: what it was trained on, named as `load_base` takes it, or `NAME:TAG`; what the folder
            says if None.
        pretrained: tag or file of the base's weights, where `base` does not say it.

    Raises:
        RAdapterError: the folder can't be read, it holds more than a plain LoRA, or it does not fit
            the base.
    """
    folder = Path(folder)
    lora = read_lora(folder)
    if base is None:
        base = _base_of(folder, lora.base)
    start = load_base(*split_name(base, pretrained))
    form = form_of(start)
    if form.kind != "clip":
        raise RAdapterError(f"{base} is no CLIPModel in transformers; --lora takes those alone")
    weights = weights_of(start)
    theirs = to_transformers(weights, form.weights)
    for name, layer in lora.layers.items():
        weight = theirs.get(f"{name}.weight")
        if weight is None:
            raise RAdapterError(f"{folder} adapts the layer {name}, which {base} has not")
        shape = [len(layer.up), layer.down.shape[1]]
        if list(weight.shape) != shape:  # before a product that could fill the memory
            raise RAdapterError(
                f"{folder} is of another base than {base}: its change of {name} is {shape}, and"
                f" the layer's weight {list(weight.shape)}"
            )
        theirs[f"{name}.weight"] = layer.added_to(weight)
    merged = to_open_clip(theirs, form.weights)
    shaped = {name: tensor.reshape(weights[name].shape) for name, tensor in merged.items()}
    whole = f"{base}:{pretrained}" if pretrained else base
    made_of = {
        "kind": "lora",
        "name": folder.absolute().name,
        "base": whole,
        "digest": digest_of(folder / WEIGHTS),
    }
    tuned = check_weights(str(folder), {**weights, **shaped}, weights)
    return Tuned(start, Line(weights, tuned, made_of))


def read_lora(folder: Path) -> Lora:
    """Read a folder of `peft`.

    Raises:
        RAdapterError: it can't be read, or holds more than a plain LoRA of linear layers.
    """
    config = _config(folder / CONFIG)
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
    layers = {name: _layer(path, name, half, config) for name, half in halves.items()}
    return Lora(str(config.get("base_model_name_or_path") or ""), layers)


def _layer(path: Path, layer: str, half: dict[str, Tensor], config: dict[str, Any]) -> LoraLayer:
    down = half.get("A")
    up = half.get("B")
    if down is None or up is None or len(down) != up.shape[1]:
        raise RAdapterError(f"{path} is damaged: lora_A and lora_B of {layer} do not fit")
    rank = int(_of_layer(layer, config.get("rank_pattern"), config.get("r")))
    if rank != len(down):
        raise RAdapterError(
            f"{path} is damaged: {layer} has rank {len(down)}, and {rank} by {CONFIG}"
        )
    alpha = _of_layer(layer, config.get("alpha_pattern"), config.get("lora_alpha"))
    return LoraLayer(up, down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_layer(layer: str, patterns: Any, usual: Any) -> float:
    """The value of a layer: that of the first pattern that is its name or the end of it."""
    for pattern, value in (patterns or {}).items():
        if not _PATTERN.fullmatch(pattern):
            raise RAdapterError(
                f"{CONFIG} has the pattern {short(pattern)}; allowed are names of layers"
            )
        name = pattern.removeprefix("^")
        if layer == name or (layer.endswith(f".{name}") and name == pattern):
            return _number(value)
    return _number(usual)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RAdapterError(f"{CONFIG} has the rank or alpha {short(value)}; allowed are numbers")
    if value <= 0:
        raise RAdapterError(f"{CONFIG} has the rank or alpha {value}; allowed: more than 0")
    return float(value)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RAdapterError(
            f"{path.parent} is no folder of peft: could not read {path.name}: {reason(error)}"
        ) from error
    if not isinstance(config, dict):
        raise RAdapterError(f"{path} is no configuration of peft")
    if config.get("peft_type") != "LORA":
        raise RAdapterError(
            f"{path} is of the kind {short(config.get('peft_type'))}; allowed: LORA"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise RAdapterError(
            f"{path} has init_lora_weights {short(start)}, which changes the base itself;"
            " convert it by peft (path_initial_model_for_weight_conversion) first"
        )
    for name, value in config.items():
        plain = name in _KNOWN or name == "init_lora_weights" or not value
        if not plain and (name, value) != ("bias", "none"):
            raise RAdapterError(
                f"{path} has {short(name)} {short(value)}, which is more than a plain LoRA; merge"
                " it by peft's merge_and_unload, and export that with --checkpoint"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise RAdapterError(f"{path} has {name} {short(config[name])}; allowed: a table")
    return config


def _base_of(folder: Path, name: str) -> str:
    """What a LoRA was trained on, as `load_base` takes it."""
    if not name:
        raise RAdapterError(
            f"{folder} does not say what it was trained on; name it with --base, such as --base"
            " hf-hub:openai/clip-vit-base-patch32"
        )
    return f"{LOCAL}{name}" if Path(name).is_dir() else f"{HUB}{name}"
