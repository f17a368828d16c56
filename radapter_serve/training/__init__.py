"""Training adapters: the loss, the average, the data, the recipe, the loop.

The names below load on first use: `radapter_serve.training.loss` needs torch, but not the library
`datasets`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_serve.training.loss import gather_with_grad, mpm_nce, pairwise_sigmoid
    from radapter_serve.training.recipe import Recipe, Run, load_recipe
    from radapter_serve.training.setup import Average, choose_form
    from radapter_serve.training.start import train

__all__ = [
    "Average",
    "Recipe",
    "Run",
    "choose_form",
    "gather_with_grad",
    "load_recipe",
    "mpm_nce",
    "pairwise_sigmoid",
    "train",
]

_HOME = {
    "Average": ".setup",
    "Recipe": ".recipe",
    "Run": ".recipe",
    "choose_form": ".setup",
    "gather_with_grad": ".loss",
    "load_recipe": ".recipe",
    "mpm_nce": ".loss",
    "pairwise_sigmoid": ".loss",
    "train": ".start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
