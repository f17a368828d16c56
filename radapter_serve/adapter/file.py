"""The adapter file, `adapter.safetensors`, as docs/adapter-file.md specifies it; its fold into
plain CLIP weights; and averages of adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from radapter_serve.contract.errors import check_alpha
from radapter_serve.data.source import RunSource
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import check_model_file, checker, staged
from radapter_serve.sources import ADAPTER, CHECKPOINT

FORMAT_VERSION = 1
Text = Annotated[str, Field(min_length=1)]
Template = Annotated[str, Field(pattern=r"\{\}")]
#: Names in the state dict of each tower's last layer, which only the normalisation follows: a
#: parameter [in, out] that is used as `x @ P`, or a linear layer.
PROJECTIONS = {
    "image": ("visual.proj", "visual.head.proj", "visual.trunk.head"),
    "text": ("text_projection", "text.text_projection", "text.proj"),
}


@dataclass(frozen=True)
class Metadata:
    """Metadata in the header of an adapter file.

    Attributes:
        architecture: an open_clip name, or `local-dir:PATH`.
        pretrained: an open_clip tag or the path of a checkpoint; None for `local-dir:`.
        base_digest: digest of the base's adapted tensors, see `base_digest`.
        rank: rank of the adapters; None for full rank.
        task: `classification`, `retrieval` or `segmentation`.
        alpha: default α, in [0, 1].
        templates: prompt templates with `{}` for the class name.
        recipe: the recipe of the training, as in `recipe.yaml`; `source` has its data.
        metrics: metrics on the validation data.
        classes: names of the trained classes, in the order of the labels and as in a label file:
            with synonyms after commas. A name may occur twice, for two classes. None if the task
            has no classes.
        held_out: digest of the names of the images that `val_fraction` held out of training, see
            `held_out_digest`; None if it held out no images.
        text_tower: digest of the base's text tower, as a release has it, if the adapter is on the
            text's projection: so a server can put it beside a release.
        confidence: calibrated scores at `alpha`, the fields of a release's `Confidence`, by images
            that the adapter was not trained with; None without them.
    """

    architecture: Text
    base_digest: Text
    pretrained: str | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    task: Literal["classification", "retrieval", "segmentation"] = "classification"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    templates: Annotated[list[Template], Field(min_length=1)] = field(
        default_factory=lambda: ["a photo of a {}."]
    )
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    classes: Annotated[list[Text], Field(min_length=1)] | None = None
    held_out: Text | None = None
    text_tower: Text | None = None
    confidence: dict[str, Any] | None = None
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION

    @cached_property
    def source(self) -> RunSource:
        """The training data and the validation data."""
        return RunSource.from_json(self.recipe, self.task)


@dataclass(frozen=True)
class Adapter:
    """Learned tensors by state-dict key: `KEY` [d, d] for full rank, else `KEY.up` [d, r] and
    `KEY.down` [r, d]. KEY names a layer, or a projection [in, d] that is a tensor itself.
    """

    tensors: dict[str, Tensor]
    metadata: Metadata

    @property
    def keys(self) -> list[str]:
        """State-dict keys of the adapted layers."""
        return sorted({name.removesuffix(".up").removesuffix(".down") for name in self.tensors})

    @property
    def digest(self) -> str:
        """The `sha256:` digest of names and fp32 values."""
        return tensors_digest(self.tensors)

    def layer(self, key: str) -> dict[str, Tensor]:
        """The tensors of one layer: `full` [d, d], or `up` [d, r] and `down` [r, d]."""
        if key in self.tensors:
            return {"full": self.tensors[key]}
        return {name: self.tensors[f"{key}.{name}"] for name in ("up", "down")}

    def matrix(self, key: str) -> Tensor:
        """F of one layer, fp32 [d, d]."""
        if key in self.tensors:
            return self.tensors[key].float()
        return self.tensors[f"{key}.up"].float() @ self.tensors[f"{key}.down"].float()


def base_digest(state_dict: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    """Digest of what an adapter was trained on, over fp32 values: the tensors that its fold
    changes, or, for a projection, whose input the whole tower makes, all tensors of its tower.

    Args:
        state_dict: state dict of the base, without adapters.
        keys: state-dict keys of the adapted layers.
    """
    names = {name for key in keys for name in tensors_of(state_dict, key)}
    for tower, projections in PROJECTIONS.items():
        if set(projections) & set(keys):
            names |= {name for name in state_dict if tower_of(name) == tower}
    return tensors_digest({name: state_dict[name] for name in names})


def tower_of(name: str) -> str:
    """The tower of a tensor of a state dict, `image` or `text`; empty for the logits' scale."""
    if name.startswith("visual."):
        return "image"
    return "" if name.startswith("logit_") else "text"


def tensors_of(state_dict: Mapping[str, Tensor], key: str) -> list[str]:
    """Names of an adapted layer's tensors: `KEY.weight` [d, in] and `KEY.bias` [d], or `KEY`, a
    projection [in, d] that is used as `x @ P`; empty if the state dict has no such layer.
    """
    if key in state_dict:
        return [key] if state_dict[key].ndim == 2 else []
    if f"{key}.weight" not in state_dict:
        return []
    return [name for name in (f"{key}.weight", f"{key}.bias") if name in state_dict]


def changes(state_dict: Mapping[str, Tensor], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the change of each tensor that a fold at α 1 changes, in fp32: `F·W` and
    `F·b` of a layer, `P·Fᵀ` of a projection.
    """
    for key in adapter.keys:
        for name in tensors_of(state_dict, key):
            tensor = state_dict[name].float()
            matrix = adapter.matrix(key).to(tensor.device)
            yield name, tensor @ matrix.T if name == key else matrix @ tensor


def check_base(state_dict: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Refuse an adapter that was trained on another base; the error names both digests."""
    missing = [key for key in adapter.keys if not tensors_of(state_dict, key)]
    digest = f"no layer {missing[0]}" if missing else base_digest(state_dict, adapter.keys)
    if digest != adapter.metadata.base_digest:
        meta = adapter.metadata
        raise RAdapterError(
            f"the adapter belongs to another base: it was trained on {meta.base_digest} "
            f"({meta.architecture}, pretrained {meta.pretrained}), this model has {digest}; "
            "load that base (--base NAME:TAG) or train a new adapter with radapter-train"
        )
    _check_tensors(adapter, state_dict)


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter file atomically.

    Args:
        adapter: tensors and metadata.
        path: the file; its folder must exist.

    Raises:
        RAdapterError: tensors or metadata break the specification, or the disk is full.
    """
    path = Path(path)
    header = {
        name: json.dumps(value) for name, value in dataclasses.asdict(adapter.metadata).items()
    }
    _metadata(header)
    _check_tensors(adapter)
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    try:
        with staged(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    except (OSError, SafetensorError) as error:
        raise RAdapterError(f"could not write {path}: {error}") from error


def load_adapter(path: str | PathLike[str]) -> Adapter:
    """Read an adapter file, or the adapter file in a run's folder.

    Args:
        path: `adapter.safetensors`, or a folder that holds it.

    Raises:
        RAdapterError: there is no such file, it breaks the specification, or its version is
            unknown.
    """
    path = Path(path)
    run = path.parent if path.suffix == ".safetensors" else path
    path = path / ADAPTER if path.is_dir() else path
    if not path.is_file():
        command = "make one with radapter-train --out"
        if (run / CHECKPOINT).is_file():
            command = "finish the run with radapter-train --resume"
        raise RAdapterError(f"no adapter file at {path}; {command} {shlex.quote(str(run))}")
    try:
        check_model_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        adapter = Adapter(tensors, _metadata(header))
        _check_tensors(adapter)
    except (SafetensorError, OSError, ValueError, RAdapterError) as error:
        raise RAdapterError(f"{path} is not an adapter file: {reason(error)}") from error
    return adapter


def _metadata(header: Mapping[str, str]) -> Metadata:
    """Read metadata from the JSON of a header, checked with the types and ranges of `Metadata`."""
    known = {field.name for field in dataclasses.fields(Metadata)}
    values = {}
    for name in known & set(header):
        try:
            values[name] = json.loads(header[name])
        except (ValueError, RecursionError) as error:
            raise RAdapterError(f"its {name} is not JSON: {reason(error)}") from error
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RAdapterError(
            f"it has format version {version}, and this radapter-serve reads up to"
            f" {FORMAT_VERSION}; use the version of radapter-serve that wrote it"
        )
    try:
        metadata = checker(Metadata).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _refusal(error) from error
    try:
        _ = metadata.source  # which is read once
    except ValidationError as error:
        raise _refusal(error, "recipe") from error
    return metadata


def _refusal(error: ValidationError, *place: str) -> RAdapterError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in (*place, *first["loc"]))
    return RAdapterError(f"its {where!r} is {first['input']!r:.80}: {first['msg']}")


def _check_tensors(adapter: Adapter, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Refuse tensors whose names, types, shapes or values break the specification; the width of a
    layer is that of its base, if given.
    """
    tensors = adapter.tensors
    rank = adapter.metadata.rank
    shapes: dict[str, tuple[int, int]] = {}
    for key in adapter.keys:
        if state_dict is None:
            first = tensors.get(key if rank is None else f"{key}.up")
            width = 0 if first is None or not first.ndim else len(first)
        else:
            name = tensors_of(state_dict, key)[0]
            width = state_dict[name].shape[1 if name == key else 0]
        if rank is None:
            shapes[key] = (width, width)
        else:
            shapes[f"{key}.up"] = (width, rank)
            shapes[f"{key}.down"] = (rank, width)
    if not shapes:
        raise RAdapterError("the adapter is damaged: it has no tensors")
    for name in sorted({*shapes, *tensors}):
        tensor = tensors.get(name)
        shape = shapes.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            kind = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            wanted = f"torch.float32 {shape}" if shape else f"left out at rank {rank}"
            raise RAdapterError(
                f"the adapter is damaged: tensor {name!r} is {kind}, should be {wanted}"
            )
        if not tensor.isfinite().all():
            raise RAdapterError(
                f"the adapter is damaged: tensor {name!r} holds values that are not finite"
            )


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The `sha256:` digest of the names and fp32 values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return f"sha256:{digest.hexdigest()}"


@torch.no_grad()
def fold(state_dict: Mapping[str, Tensor], adapter: Adapter, alpha: float) -> dict[str, Tensor]:
    """Fold an adapter into the weights of its base: `W + α·F·W`, `b + α·F·b` (Eq. 9, F = W_adp
    transposed); a projection P, used as `x @ P`, becomes `P + α·P·Fᵀ`.

    The fold is linear in α: fold(α) = (1−α)·base + α·fold(1) on the adapted layers.

    Args:
        state_dict: state dict of the base, without adapters; not changed. Tensors that no adapter
            changes are shared.
        adapter: from `load_adapter` or `Adapters.adapter`.
        alpha: re-scaling in [0, 1].

    Returns:
        A state dict with the same keys, shapes and dtypes; computed in fp32 and cast once.

    Raises:
        RAdapterError: α is out of range, the adapter belongs to another base, or a folded value is
            not finite.
    """
    check_alpha(alpha)
    check_base(state_dict, adapter)
    folded = dict(state_dict)
    for name, change in changes(state_dict, adapter):
        base = state_dict[name]
        value = torch.add(base.float(), change, alpha=alpha).to(base.dtype)
        if not torch.isfinite(value).all():
            raise RAdapterError(
                f"folding gave values that are not finite in {name} at alpha {alpha}"
            )
        folded[name] = value
    return folded


def average_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> Adapter:
    """Average adapters in weight space, `F = Σ wᵢ·Fᵢ`, so that the average folds to the average of
    the folds: a soup (Wortsman et al., ICML 2022) of changes to one base, in full rank.

    Args:
        adapters: adapters of one base, with the same adapted layers; the first gives task,
            templates, default α and recipe.
        weights: one for each adapter, each at least 0, with the sum 1; equal weights if None.

    Raises:
        RAdapterError: there are no adapters, the bases or the adapted layers differ, or the weights
            are not one for each adapter, each at least 0, with the sum 1.
    """
    if not adapters:
        raise RAdapterError("no adapters to average; give at least one")
    if weights is None:
        weights = [1 / len(adapters)] * len(adapters)
    sums_up = math.isclose(sum(weights), 1, abs_tol=1e-6)
    if not sums_up or not all(weight >= 0 for weight in weights):
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise RAdapterError(
            f"weights are {shown}; allowed: numbers from 0 whose sum is 1, such as 0.5 0.5"
        )
    if len(weights) != len(adapters):
        raise RAdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters; give one for each"
        )
    first, *others = adapters
    meta = first.metadata
    for number, other in enumerate(others, 2):
        # A digest covers only the adapted layers, so compare the layers first: with other layers,
        # one base has another digest.
        theirs = other.metadata
        differing = sorted(set(first.keys) ^ set(other.keys))
        if differing and meta.architecture == theirs.architecture:
            has, lacks = (1, number) if differing[0] in first.keys else (number, 1)
            raise RAdapterError(
                f"adapter {has} adapts {differing[0]} and adapter {lacks} does not; only adapters"
                " of the same layers can be averaged (were both trained with the same"
                " --adapt?)"
            )
        if meta.base_digest != theirs.base_digest:
            raise RAdapterError(
                f"adapter 1 was trained on {meta.base_digest} ({meta.architecture}, pretrained"
                f" {meta.pretrained}), adapter {number} on {theirs.base_digest}"
                f" ({theirs.architecture}, pretrained {theirs.pretrained}); only adapters of one"
                " base can be averaged"
            )
    if not others:
        return first
    tensors = {}
    for key in first.keys:
        parts = [w * adapter.matrix(key) for w, adapter in zip(weights, adapters, strict=True)]
        tensors[key] = torch.stack(parts).sum(0)

    # The first adapter's metadata, without its run-specific fields.
    metadata = dataclasses.replace(meta, rank=None, metrics={}, confidence=None)
    if any(other.metadata.held_out != metadata.held_out for other in others):
        # Another adapter was trained on the images that the first one held out.
        recipe = {name: value for name, value in metadata.recipe.items() if name != "val_fraction"}
        metadata = dataclasses.replace(metadata, held_out=None, recipe=recipe)
    return Adapter(tensors, metadata)
