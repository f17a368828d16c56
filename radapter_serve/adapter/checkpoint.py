"""Checkpoints that were tuned elsewhere: a file of weights, a model's folder, or a name."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from radapter_serve.adapter.file import tensors_digest
from radapter_serve.adapter.line import Line, Tuned, check_weights, weights_of
from radapter_serve.clip.base import Base, load_base, split_name
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import digest_of
from radapter_serve.sources import HUB, LOCAL, check_base_is_named, model_name

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, and of torch.compile


def load_checkpoint(
    checkpoint: str, base: str | None = None, pretrained: str | None = None
) -> Tuned:
    """Load a tuned checkpoint and its base.

    `checkpoint` is a file of weights; a model's folder, in the form of open_clip or of
    `transformers`; `hf-hub:NAME`; or an open_clip model with its tag, `NAME:TAG`. `base`, named as
    `load_base` takes it or `NAME:TAG`, is what was tuned: a file of weights needs one for its
    architecture, the others for an α below 1.
    """
    check_base_is_named(checkpoint, base, pretrained)
    name = model_name(checkpoint)
    path = Path(checkpoint)
    made_of: dict[str, Any] = {
        "kind": "checkpoint",
        "name": path.name,
        "base": f"{base}:{pretrained}" if base and pretrained else base,
    }
    if name is None:  # a file of weights
        assert base is not None  # as was just seen
        architecture, tag = split_name(base, pretrained)
        found = read_weights(path)
        made_of["digest"] = digest_of(path)
        if tag is None and not architecture.startswith((LOCAL, HUB)):
            model = load_base(architecture, checkpoint)
            weights = check_weights(checkpoint, found, model.model.state_dict())
            return Tuned(model, Line(None, weights, made_of))
        start = load_base(architecture, tag)
        start_weights = weights_of(start)
        weights = check_weights(checkpoint, found, start_weights)
        return Tuned(start, Line(start_weights, weights, made_of))
    tuned = load_base(*split_name(name))
    weights = check_weights(checkpoint, weights_of(tuned), tuned.model.state_dict())
    made_of["digest"] = tensors_digest(weights)
    if base is None:
        return Tuned(tuned, Line(None, weights, made_of))
    start = load_base(*split_name(base, pretrained))
    _check_same(checkpoint, tuned, start)
    check_weights(checkpoint, weights, start.model.state_dict())
    start_weights = weights_of(start)
    tuned.model.load_state_dict(start_weights)
    return Tuned(tuned, Line(start_weights, weights, made_of))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights without running code: safetensors, or `torch.save` of a state dict or
    of a training checkpoint that holds one as `state_dict`.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            with warnings.catch_warnings():  # of sparse tensors, which are refused below
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
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
            " code; save the state dict alone, by torch.save(model.state_dict(), 'tuned.pt')"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds on what they can't read
        raise RAdapterError(f"could not read the checkpoint {path}: {reason(error)}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    # The weights by their names in the model itself.
    weights: dict[str, Tensor] = {}
    for name, value in found.items() if isinstance(found, Mapping) else ():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            weights = {}
            break
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        weights[name] = value
    if not weights:
        raise RAdapterError(f"{path} holds no state dict: weights by their names")
    return weights


def _check_same(checkpoint: str, tuned: Base, base: Base) -> None:
    """Refuse models that compute differently, whatever the shapes of their weights are."""
    for one, other in zip(_structure(tuned.model), _structure(base.model), strict=False):
        if one != other:
            raise RAdapterError(
                f"{checkpoint} is of another architecture than its base: it has {one}, and the base"
                f" {other}"
            )
    for name in ("mean", "std"):
        values = [[float(value) for value in of.preprocess[name]] for of in (tuned, base)]
        if values[0] != values[1]:
            raise RAdapterError(
                f"{checkpoint} prepares images in another way than its base: {name} is {values[0]},"
                f" and {values[1]} in the base"
            )


def _structure(model: nn.Module) -> list[str]:
    """The modules of a model in words: activations and heads show in no weight's shape."""
    parts = []
    for name, module in model.named_modules():
        heads = getattr(module, "num_heads", None)
        of = f" of {heads} heads" if isinstance(heads, int) else ""
        parts.append(f"{name} {type(module).__name__}{of}")
    return parts
