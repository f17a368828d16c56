"""Training adapters: the loss, the average, the data, the recipe, the loop.

The names below load on first use: the loss alone (`radapter_serve.training.loss`) needs torch, and no data sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_serve.training.average import Average
    from radapter_serve.training.loop import choose_form, train
    from radapter_serve.training.loss import gather_with_grad, mpm_nce
    from radapter_serve.training.recipe import Recipe, load_recipe

__all__ = ["Average", "Recipe", "choose_form", "gather_with_grad", "load_recipe", "mpm_nce", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from radapter_serve.training import loop, recipe

    return getattr(recipe if name == "load_recipe" else loop, name)
