"""Regularizers to compare with adapter dropping: dropout, drop path, and dropping by token."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from radapter_serve.adapter import Adapters, attach
from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.errors import RAdapterError
from radapter_serve.training.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """A change of the method's own training; the default changes nothing.

    Attributes:
        dropout: share of an adapter's output that is dropped in training (DO of Table 5), in
            [0, 1).
        drop_path: probability that a residual branch of an adapted block is left out for an image
            or a text in training (DP of Table 5), in [0, 1).
        token_drop: probability that an adapter is dropped at a token position of all images or
            texts of a batch, as the authors' code does, in [0, 1).
    """

    dropout: float = 0.0
    drop_path: float = 0.0
    token_drop: float = 0.0

    @property
    def needs_outputs(self) -> bool:
        """True if adapters must compute outputs, which the weight form does not."""
        return bool(self.dropout or self.token_drop)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe without the outputs of adapters that this variant needs."""
        if self.needs_outputs and recipe.form == "weight":
            raise RAdapterError(
                "dropout needs the outputs of adapters; allowed with it: form activation or auto"
            )

    def attach(self, model: nn.Module, rank: int | None, **how: Any) -> Adapters:
        """Attach adapters with this variant, as `radapter_serve.adapter.attach` does."""
        make = functools.partial(DropoutAdapter, dropout=self.dropout, token_drop=self.token_drop)
        adapters = attach(model, rank, make=make, **how)
        if self.drop_path:
            add_drop_path(adapters, self.drop_path)
        return adapters


OWN = Variant()  # the method's own training


class DropoutAdapter(LinearAdapter):
    """An adapter with dropout of its output in training, by number or by token position."""

    def __init__(self, width: int, rank: int | None, dropout: float, token_drop: float) -> None:
        super().__init__(width, rank)
        self.dropout = dropout
        self.token_drop = token_drop

    def change(self, x: Tensor) -> Tensor:
        """Compute the adapter's output for activations [N, L, d]."""
        output = nn.functional.dropout(super().change(x), self.dropout, self.training)
        if self.training and self.token_drop:
            keep = torch.rand(x.shape[-2], 1, device=x.device) >= self.token_drop
            output = output * keep / (1 - self.token_drop)
        return output


def add_drop_path(adapters: Adapters, p: float) -> None:
    """Leave out residual branches of the adapted blocks in training.

    Args:
        adapters: attached ones.
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
