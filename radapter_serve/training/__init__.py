"""Training adapters: the loss, the average, the data, the recipe, the loop."""

from radapter_serve.training.average import Average
from radapter_serve.training.loop import choose_form, train
from radapter_serve.training.loss import gather_with_grad, mpm_nce
from radapter_serve.training.recipe import Recipe, load_recipe

__all__ = ["Average", "Recipe", "choose_form", "gather_with_grad", "load_recipe", "mpm_nce", "train"]
