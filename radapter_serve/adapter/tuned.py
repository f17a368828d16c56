"""The base of an adapter; and models that were tuned elsewhere: a checkpoint or a LoRA, and the
line of models between it and its base, as in WiSE-FT.

The folder of a LoRA is not trusted, so it is not read with peft: that would import a module that
the configuration names, allocate any rank, and match any regular expression.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from radapter_serve.adapter.file import Adapter, tensors_digest, tower_of
from radapter_serve.clip.base import Base, load_base, split_name
from radapter_serve.clip.towers import pool_type
from radapter_serve.clip.transformers import form_of, to_open_clip, to_transformers
from radapter_serve.contract.errors import check_alpha
from radapter_serve.errors import RAdapterError, reason, short
from radapter_serve.files import check_model_file, digest_of
from radapter_serve.release.release import MadeOf, Tower
from radapter_serve.sources import HUB, LOCAL, check_base_is_named, model_name, needs_base

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, and of torch.compile
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Fields that do not change the merge, or that are read below. Any other field must be off.
_KNOWN = (
    *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
    "init_lora_weights",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # which keep the base
_LAYER = re.compile(r"(?:base_model\.model\.)?([\w.]+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class Line:
    """The weights `(1 − α)·base + α·tuned`, of two state dicts in fp32; without a base, α is 1."""

    base: Mapping[str, Tensor] | None
    tuned: Mapping[str, Tensor]
    made_of: MadeOf

    @property
    def digest(self) -> str:
        """Digest of the tuned weights, over names and fp32 values."""
        return tensors_digest(self.tuned)

    @property
    def base_digest(self) -> str:
        """Digest of the weights at the start of the line."""
        return tensors_digest(self.tuned if self.base is None else self.base)

    @property
    def changes(self) -> dict[str, Tensor]:
        """The tuned weights that differ from the base's."""
        if self.base is None:
            return {}
        return {
            name: tensor
            for name, tensor in self.tuned.items()
            if not torch.equal(tensor, self.base[name])
        }

    def check(self, alpha: float) -> None:
        """Refuse an α outside of [0, 1], and an α below 1 without a base."""
        check_alpha(alpha)
        if self.base is None and alpha != 1:
            raise needs_base(alpha, self.made_of.name)

    @torch.no_grad()
    def at(self, alpha: float) -> dict[str, Tensor]:
        """The weights at an α in [0, 1], bit for bit as WiSE-FT computes them."""
        self.check(alpha)
        if self.base is None or alpha == 1:
            return dict(self.tuned)
        return {
            name: (1 - alpha) * tensor + alpha * self.tuned[name]
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.base.items()
        }


def load_base_of(adapter: Adapter, base: str | None = None, pretrained: str | None = None) -> Base:
    """Load the base of an adapter, which may be elsewhere than in training."""
    metadata = adapter.metadata
    folder = Path(metadata.architecture.removeprefix(LOCAL))
    if base is None and metadata.architecture.startswith(LOCAL) and not folder.exists():
        where = "" if folder.is_absolute() else ", relative to the folder where it was trained"
        raise RAdapterError(
            f"the adapter's base is {metadata.architecture}{where}, and it is not there; name it"
            f" with --base {LOCAL}FOLDER"
        )
    name, tag = split_name(base or metadata.architecture, pretrained)
    return load_base(name, tag or metadata.pretrained)


def weights_of(base: Base) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    return {name: tensor.detach().clone() for name, tensor in base.model.state_dict().items()}


def check_weights(
    name: str, state: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The floating-point weights of the file `name`, in fp32, and the other tensors of `like`;
    refuses other names, shapes and values that are not finite.
    """
    needed = {key: tensor for key, tensor in like.items() if tensor.is_floating_point()}
    other = f"{name} is of another architecture than its base"
    weights = dict(like)
    for key, tensor in needed.items():
        if key not in state:
            raise RAdapterError(f"{other}: it has no weight {key}")
        if state[key].shape != tensor.shape:
            shapes = f"{list(state[key].shape)}, and {list(tensor.shape)} in the base"
            raise RAdapterError(f"{other}: its weight {key} is {shapes}")
        weights[key] = plain_values(state[key], f"{name} is damaged: its weight {key}")
    unknown = sorted(
        key for key, tensor in state.items() if key not in like and tensor.is_floating_point()
    )
    if unknown:
        raise RAdapterError(f"{other}: it has the weight {unknown[0]}, which the base has not")
    return weights


def plain_values(tensor: Tensor, subject: str) -> Tensor:
    """Convert a tensor of a file to fp32; refuses anything but finite real numbers."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not (plain and tensor.is_floating_point()):
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise RAdapterError(f"{subject} is {kind}; allowed are plain floating-point numbers")
    values = tensor.detach().float()
    if not values.isfinite().all():
        raise RAdapterError(f"{subject} holds values that are not finite")
    return values


def load_checkpoint(checkpoint: str, base: str | None = None) -> tuple[Base, Line]:
    """Load a tuned checkpoint: its base, with the weights at the start of the line, and the line. A
    file of weights needs `base` for its architecture, others for an α below 1.
    """
    check_base_is_named(checkpoint, base)
    name = model_name(checkpoint)
    path = Path(checkpoint)
    if name is None:  # a file of weights
        assert base is not None  # by check_base_is_named
        architecture, tag = split_name(base)
        state = read_weights(path)
        made_of = MadeOf("checkpoint", path.name, base, digest_of(path))
        if tag is None and not architecture.startswith((LOCAL, HUB)):
            model = load_base(architecture, checkpoint)
            weights = check_weights(checkpoint, state, model.model.state_dict())
            return model, Line(None, weights, made_of)
        start = load_base(architecture, tag)
        start_weights = weights_of(start)
        weights = check_weights(checkpoint, state, start_weights)
        return start, Line(start_weights, weights, made_of)
    tuned = load_base(*split_name(name))
    weights = check_weights(checkpoint, weights_of(tuned), tuned.model.state_dict())
    made_of = MadeOf("checkpoint", path.name, base, tensors_digest(weights))
    if base is None:
        return tuned, Line(None, weights, made_of)
    start = load_base(*split_name(base))
    # Refuse models that compute differently, even if their weights have the same shapes. Compare
    # the modules one by one, for activations and heads that no weight's shape shows.
    for ours, theirs in zip(_modules_of(tuned.model), _modules_of(start.model), strict=False):
        if ours != theirs:
            raise RAdapterError(
                f"{checkpoint} is of another architecture than its base: it has {ours}, and the"
                f" base {theirs}"
            )
    for name in ("mean", "std"):
        values = [[float(value) for value in of.preprocess[name]] for of in (tuned, start)]
        if values[0] != values[1]:
            raise RAdapterError(
                f"{checkpoint} prepares images in another way than its base: {name} is {values[0]},"
                f" and {values[1]} in the base"
            )
    check_weights(checkpoint, weights, start.model.state_dict())
    start_weights = weights_of(start)
    tuned.model.load_state_dict(start_weights)
    return tuned, Line(start_weights, weights, made_of)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights without running code: safetensors, or a state dict of torch."""
    try:
        check_model_file(path)
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # for sparse tensors, which are refused later
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = zipfile.is_zipfile(path) or file.read(1) == b"\x80"  # of any version
        if not is_pickle:
            raise RAdapterError(
                f"could not read the checkpoint {path}: it is neither of torch.save nor of"
                " safetensors"
            ) from error
        raise RAdapterError(
            f"{path} holds pickled objects beside its weights, and loading them could run foreign"
            " code; save only the state dict, with torch.save(model.state_dict(), 'tuned.pt')"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds of errors
        raise RAdapterError(f"could not read the checkpoint {path}: {reason(error)}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    # Name the weights as in the model, without the prefixes of wrappers.
    weights: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            weights = {}
            break
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        weights[name] = value
    if not weights:
        raise RAdapterError(f"{path} holds no state dict, which maps names to weights")
    return weights


def _modules_of(model: nn.Module) -> list[str]:
    """List a model's modules, such as `visual.transformer.resblocks.0.attn MultiheadAttention of 12
    heads`.
    """
    modules = []
    for name, module in model.named_modules():
        heads = getattr(module, "num_heads", None)
        of = f" of {heads} heads" if isinstance(heads, int) else ""
        pool = pool_type(module)
        pooled = f" pooled by {pool}" if pool != "none" else ""
        modules.append(f"{name} {type(module).__name__}{of}{pooled}")
    return modules


def towers_of(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tower]:
    """The facts `image_tower` and `text_tower` of a release, from the base and what α scales in it:
    the tensors of an adapter, or `Line.changes`.
    """
    weights = model.state_dict()
    modules = _modules_of(model)

    towers = {}
    for tower in ("image", "text"):
        tensors_of_tower, changed = (
            {name: tensor for name, tensor in tensors.items() if tower_of(name) == tower}
            for tensors in (weights, changes)
        )
        # Activations and heads show in no tensor.
        parts = [line for line in modules if line.startswith("visual") == (tower == "image")]
        base = digest_of("\n".join([*parts, tensors_digest(tensors_of_tower)]).encode())
        towers[f"{tower}_tower"] = Tower(base, tensors_digest(changed) if changed else None)
    return towers


def load_lora(folder: str | Path, base: str | None = None) -> tuple[Base, Line]:
    """Load a LoRA: its base, by default the one that it names, and the line to the base with the
    LoRA merged.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    layers = _read_layers(folder, config)

    # Load the base.
    if base is None:
        name = str(config.get("base_model_name_or_path") or "")
        if not name:
            raise RAdapterError(
                f"{folder} does not say what it was trained on; name it with --base, such as --base"
                " hf-hub:openai/clip-vit-base-patch32"
            )
        base = f"{LOCAL}{name}" if Path(name).is_dir() else f"{HUB}{name}"
    start = load_base(*split_name(base))
    form = form_of(base, start.model, start.tokenizer)
    weights = weights_of(start)

    # Merge layer by layer, by the names of transformers: W + scale·B·A, as peft computes it.
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
    merged = to_open_clip(theirs, form, weights)
    made_of = MadeOf("lora", folder.absolute().name, base, digest_of(folder / WEIGHTS))
    tuned = check_weights(str(folder), {**weights, **merged}, weights)
    return start, Line(weights, tuned, made_of)


def _read_layers(folder: Path, config: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Read lora_B [out, r] and lora_A [r, in] of each layer, and the factor of their product."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise RAdapterError(f"{folder} holds no {WEIGHTS}; save it with safe_serialization=True")
    try:
        check_model_file(path)
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise RAdapterError(f"could not read {path}: {reason(error)}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise RAdapterError(
                f"{path} has the tensor {short(name)}; allowed are lora_A and lora_B of linear"
                " layers: merge it with peft's merge_and_unload, and export that with --checkpoint"
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
                f"{path} is damaged: {layer} has rank {len(down)}, and {rank} according to {CONFIG}"
            )
        alpha = _value_of(layer, config.get("alpha_pattern"), config.get("lora_alpha"))
        layers[layer] = (up, down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return layers


def _value_of(layer: str, patterns: Any, default: Any) -> float:
    """The rank or alpha of a layer: of the first pattern that ends its name, or the default."""
    value = default
    for pattern, pattern_alpha in (patterns or {}).items():
        if not _PATTERN.fullmatch(pattern):
            raise RAdapterError(
                f"{CONFIG} has the pattern {short(pattern)}; allowed are names of layers"
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            value = pattern_alpha
            break
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise RAdapterError(
            f"{CONFIG} has the rank or alpha {short(value)}; allowed: numbers above 0"
        )
    return float(value)


def _read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a plain LoRA; refuses any other LoRA."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RAdapterError(
            f"{path.parent} is not a folder of peft: could not read {path.name}: {reason(error)}"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise RAdapterError(f"{path} is of the kind {short(kind)}; allowed: LORA")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise RAdapterError(
            f"{path} has init_lora_weights {short(start)}, which changes the base itself;"
            " convert it with peft (path_initial_model_for_weight_conversion) first"
        )
    for name, value in config.items():
        if value and name not in _KNOWN and (name, value) != ("bias", "none"):
            raise RAdapterError(
                f"{path} has {short(name)} {short(value)}, which is more than a plain LoRA; merge"
                " it with peft's merge_and_unload, and export that with --checkpoint"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise RAdapterError(f"{path} has {name} {short(config[name])}; allowed: a table")
    return config
