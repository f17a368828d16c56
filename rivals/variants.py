"""Other trainings of R-Adapter: what Table 5 puts beside its own parts, and what came after it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from radapter_serve.adapter import Adapters, attach
from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.errors import RAdapterError
from radapter_serve.training.average import Average
from radapter_serve.training.recipe import Recipe

SCALE = 0.1  # where the paper's released code starts


@dataclass(frozen=True)
class Variant:
    """What differs from the method's own training; nothing by default.

    Attributes:
        dropout: share of an adapter's output that is dropped in training (DO of Table 5), in [0,
            1).
        drop_path: probability that a residual branch of an adapted block is left out for an image
            or a text in training (DP of Table 5), in [0, 1).
        learned_scale: train a factor of each adapter, too, from 0.1 on, as the paper's released
            code does; it becomes part of the adapter in the end.
        average: ema is the moving average of Eq. 8; trajectory weighs the start and the end of the
            run most (TRACER), and uses neither momentum nor bias_correction.
        falling: whether dropping falls from the recipe's `drop` to 0 after three quarters of the
            run (CoTo), in place of staying constant.
    """

    dropout: float = 0.0
    drop_path: float = 0.0
    learned_scale: bool = False
    average: Literal["ema", "trajectory"] = "ema"
    falling: bool = False

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this does not go together with.

        Raises:
            RAdapterError: says which fields exclude each other.
        """
        if self.dropout and recipe.form == "weight":
            raise RAdapterError(
                "dropout needs the outputs of adapters; allowed with it: form activation or auto"
            )
        if self.average == "trajectory" and recipe.rank is not None:
            raise RAdapterError(
                f"average is trajectory at rank {recipe.rank}, but an average of low ranks has no"
                " low rank; leave one of them out"
            )

    def attach(self, model: nn.Module, rank: int | None, **how: Any) -> Adapters:
        """Attach its adapters; the rest is as of `radapter_serve.adapter.attach`."""
        make = functools.partial(VariedAdapter, variant=self)
        adapters = attach(model, rank, make=make, **how)
        if self.drop_path:
            add_drop_path(adapters, self.drop_path)
        return adapters


OWN = Variant()  # the method's own training


class VariedAdapter(LinearAdapter):
    """An adapter with dropout and a learned scale.

    Args:
        width: of the layer.
        rank: None for full rank.
        variant: says which of them it has.
    """

    def __init__(self, width: int, rank: int | None, variant: Variant) -> None:
        super().__init__(width, rank)
        self.dropout = variant.dropout
        self.scale = nn.Parameter(torch.tensor(SCALE)) if variant.learned_scale else None

    @property
    def factor(self) -> float | Tensor:
        """On what the adapter adds."""
        own = self.alpha * self.gate
        return own if self.scale is None else own * self.scale

    def change(self, x: Tensor) -> Tensor:
        """What the adapter adds to activations."""
        return nn.functional.dropout(super().change(x), self.dropout, self.training)

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter file has of it: the scale is part of the matrix."""
        found = super().tensors()
        scale = found.pop("scale", None)
        if scale is not None:
            name = "full" if "full" in found else "up"
            found[name] = found[name] * scale
        return found


def add_drop_path(adapters: Adapters, p: float) -> None:
    """Leave out residual branches of the adapted blocks in training.

    Args:
        adapters: that are attached.
        p: probability for each branch, and for each image or text, in [0, 1).
    """

    def dropped(x: Tensor) -> Tensor:
        keep = torch.rand(len(x), 1, 1, device=x.device) >= p
        return x * keep / (1 - p)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not adapters.training:
            return output
        if isinstance(output, tuple):
            return (dropped(output[0]), *output[1:])
        return dropped(output)

    for site in adapters.sites:  # the last module of a branch, after the adapter
        adapters.hooks.append(site.output.register_forward_hook(hook))


class TrajectoryAverage(Average):
    """`W̃ = Σ wᵢ·Wᵢ / Σ wᵢ` over the start and every step, in which the start and the end count
    most.

    wᵢ is the density of Beta(β, β) at (i + ½)/(T + 1), with β = 0.5 (TRACER).

    Args:
        adapters: whose tensors are averaged.
        steps: T, of the whole run.
    """

    def __init__(self, adapters: Adapters, steps: int) -> None:
        super().__init__(adapters, 0.0)
        at = (np.arange(steps + 1) + 0.5) / (steps + 1)
        weights = (at * (1 - at)) ** -0.5
        self._shares = (weights / weights.cumsum()).tolist()

    def share(self) -> float:
        """The share of the newest values in the average, from 0 to 1."""
        return float(self._shares[self.steps])
