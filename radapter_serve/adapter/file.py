"""The adapter file: `adapter.safetensors`, specified in the README."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Metadata:
    """What the header of an adapter file says.

    Attributes:
        architecture: an open_clip name, or `local-dir:PATH`.
        pretrained: an open_clip tag or the path of a checkpoint; None for `local-dir:`.
        base_digest: of the base's adapted tensors, see `base_digest`.
        rank: None for full rank.
        task: `classification`, `retrieval` or `segmentation`.
        alpha: the re-scaling to use where none is asked for, in [0, 1].
        templates: prompt templates with `{}` for the class name.
        recipe: how it was trained.
        metrics: what validation measured.
        classes: names of the classes that it was trained on, in the order of the labels and as a label file has them:
            synonyms after commas. A name may occur twice, for two classes. None where the task has no classes, and in
            files of earlier releases.
    """

    architecture: str
    base_digest: str
    pretrained: str | None = None
    rank: int | None = None
    task: str = "classification"
    alpha: float = 0.5
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Adapter:
    """Learned tensors by state-dict key: `KEY` [d, d] for full rank, `KEY.up` [d, r] and `KEY.down` [r, d] else."""

    tensors: dict[str, Tensor]
    metadata: Metadata

    @property
    def keys(self) -> list[str]:
        """State-dict keys of the adapted layers."""
        return sorted({name.removesuffix(".up").removesuffix(".down") for name in self.tensors})

    @property
    def digest(self) -> str:
        """`sha256:` over names and fp32 values."""
        return _digest(self.tensors, self.tensors)

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
    """Digest of the tensors that a fold changes, over fp32 values.

    Args:
        state_dict: of the base, without adapters.
        keys: state-dict keys of the adapted layers.
    """
    names = [f"{key}.{kind}" for key in keys for kind in ("weight", "bias")]
    return _digest(state_dict, [name for name in names if name in state_dict])


def check_base(state_dict: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Refuse an adapter that was trained on another base.

    Raises:
        RAdapterError: names both digests.
    """
    missing = [key for key in adapter.keys if f"{key}.weight" not in state_dict]
    found = f"no layer {missing[0]}" if missing else base_digest(state_dict, adapter.keys)
    if found != adapter.metadata.base_digest:
        meta = adapter.metadata
        raise RAdapterError(
            f"the adapter belongs to another base: it was trained on {meta.base_digest} "
            f"({meta.architecture}, pretrained {meta.pretrained}), this model has {found}; "
            f"load that base (--base, --pretrained) or train a new adapter with radapter-train"
        )
    for key in adapter.keys:
        width, rank = len(state_dict[f"{key}.weight"]), adapter.metadata.rank
        shapes = {key: (width, width)} if rank is None else {f"{key}.up": (width, rank), f"{key}.down": (rank, width)}
        for name, shape in shapes.items():
            found_shape = tuple(adapter.tensors[name].shape) if name in adapter.tensors else "missing"
            if found_shape != shape:
                raise RAdapterError(f"the adapter file is damaged: tensor {name} is {found_shape}, should be {shape}")


def check_alpha(alpha: float) -> None:
    """Refuse an α outside [0, 1]."""
    if not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise RAdapterError(f"alpha is {alpha}; allowed: a number from 0 (the base) to 1 (all that was learned)")


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter file; it appears whole or not at all.

    Args:
        adapter: tensors and metadata.
        path: the file; its folder must exist.
    """
    path = Path(path)
    header = {name: json.dumps(value) for name, value in dataclasses.asdict(adapter.metadata).items()}
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    try:
        with staged(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    except (OSError, SafetensorError) as error:
        raise RAdapterError(f"could not write {path}: {error}") from error


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter file, or the one in a run's folder.

    Args:
        path: `adapter.safetensors`, or a folder that holds it.

    Raises:
        RAdapterError: there is none, or it is not an adapter file of a version known here.
    """
    path = Path(path)
    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise RAdapterError(f"no adapter file at {path}; make one with radapter-train --out {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version = header.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise RAdapterError(
                f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}: "
                f"pip install --upgrade radapter-serve"
            )
        known = {f.name for f in dataclasses.fields(Metadata)}
        metadata = Metadata(**{name: value for name, value in header.items() if name in known})
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise RAdapterError(f"{path} is not an adapter file: {error}") from error
    return Adapter(tensors, metadata)


def _digest(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return f"sha256:{digest.hexdigest()}"
