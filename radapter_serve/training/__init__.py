"""Training adapters: the loss, the average, the data, the recipe, the loop.

The names below load on first use: `radapter_serve.training.loss` needs torch, but not the library
`datasets`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from radapter_serve.errors import lazily

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

__getattr__ = lazily(
    __name__,
    {
        "radapter_serve.training.loss": ["gather_with_grad", "mpm_nce", "pairwise_sigmoid"],
        "radapter_serve.training.recipe": ["Recipe", "Run", "load_recipe"],
        "radapter_serve.training.setup": ["Average", "choose_form"],
        "radapter_serve.training.start": ["train"],
    },
)
