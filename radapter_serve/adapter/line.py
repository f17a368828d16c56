"""Two models of one architecture and all models between them: WiSE-FT's interpolation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from radapter_serve.adapter.file import tensors_digest
from radapter_serve.clip.base import Base
from radapter_serve.contract.errors import check_alpha
from radapter_serve.errors import RAdapterError
from radapter_serve.sources import needs_base


@dataclass(frozen=True)
class Line:
    """The weights `(1 − α)·base + α·tuned`.

    Both are state dicts of the same names and shapes, fp32; a `base` that is not known is None, and
    α must be 1. `made_of` is a release's entry: kind, name, base and digest.
    """

    base: Mapping[str, Tensor] | None
    tuned: Mapping[str, Tensor]
    made_of: dict[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the tuned weights, over names and fp32 values."""
        return tensors_digest(self.tuned)

    @property
    def base_digest(self) -> str:
        """Digest of the weights that the line starts from."""
        return tensors_digest(self.tuned if self.base is None else self.base)

    def check(self, alpha: float) -> None:
        """Refuse an α outside of [0, 1], and one below 1 without a base."""
        check_alpha(alpha)
        if self.base is None and alpha != 1:
            raise needs_base(alpha, self.made_of["name"])

    @torch.no_grad()
    def at(self, alpha: float) -> dict[str, Tensor]:
        """The weights at one α in [0, 1], computed as WiSE-FT does, to the bit."""
        self.check(alpha)
        if self.base is None or alpha == 1:
            return dict(self.tuned)
        return {
            name: (1 - alpha) * tensor + alpha * self.tuned[name]
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.base.items()
        }


@dataclass(frozen=True)
class Tuned:
    """A model that was tuned elsewhere: its base, with the start of the line as weights, and the
    line.
    """

    base: Base
    line: Line


def weights_of(base: Base) -> dict[str, Tensor]:
    """A copy of a model's weights, which stays as it is when the model changes."""
    return {name: tensor.detach().clone() for name, tensor in base.model.state_dict().items()}


def check_weights(
    name: str, found: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a file in fp32, in the order of `like`, a state dict of the architecture.

    Tensors there that are no floating-point numbers stay as they are. Refuses weights that are
    missing, left over, of another shape or not finite; `name` is the file's.
    """
    needed = {key: tensor for key, tensor in like.items() if tensor.is_floating_point()}
    other = f"{name} is of another architecture than its base"
    weights = dict(like)
    for key, tensor in needed.items():
        if key not in found:
            raise RAdapterError(f"{other}: it has no weight {key}")
        if found[key].shape != tensor.shape:
            shapes = f"{list(found[key].shape)}, and {list(tensor.shape)} in the base"
            raise RAdapterError(f"{other}: its weight {key} is {shapes}")
        weights[key] = plain_values(found[key], f"{name} is damaged: its weight {key}")
    unknown = sorted(
        key for key, tensor in found.items() if key not in like and tensor.is_floating_point()
    )
    if unknown:
        raise RAdapterError(f"{other}: it has the weight {unknown[0]}, which the base has not")
    return weights


def plain_values(tensor: Tensor, subject: str) -> Tensor:
    """A tensor of a file in fp32; refuses anything but finite real numbers. `subject` begins the
    error.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not (plain and tensor.is_floating_point()):
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise RAdapterError(f"{subject} is {kind}; allowed are plain floating-point numbers")
    values = tensor.detach().float()
    if not values.isfinite().all():
        raise RAdapterError(f"{subject} holds values that are not finite")
    return values
