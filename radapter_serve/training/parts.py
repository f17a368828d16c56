"""What of a training run can be exchanged for something else, and what the method itself takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from radapter_serve.adapter import Adapters
from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.clip.base import Base
from radapter_serve.training.average import Average
from radapter_serve.training.preserve import distance_of_images
from radapter_serve.training.recipe import Recipe
from radapter_serve.training.tasks import Data
from radapter_serve.training.validation import validate


def moving_average(adapters: Adapters, recipe: Recipe, steps: int) -> Average:
    """The accumulation of Eq. 8.

    Args:
        adapters: fresh ones.
        recipe: with a momentum, as `Recipe.of_length` gives it.
        steps: of the whole run.
    """
    assert recipe.momentum is not None
    return Average(adapters, recipe.momentum, bias_correction=recipe.bias_correction)


def constant_drop(recipe: Recipe, step: int, steps: int) -> float:
    """The probability of adapter dropping (Eq. 7), the same at every step.

    Args:
        recipe: names it.
        step: from 0.
        steps: of the whole run.
    """
    return recipe.drop


@dataclass(frozen=True)
class Parts:
    """The parts of a run that an ablation exchanges; the defaults are the method's own.

    Attributes:
        layer: makes the adapter of one layer from its width and its rank (None for full rank).
        attached: called with the adapters once they are attached.
        average: makes the average of the adapters over the steps.
        drop: the probability of adapter dropping at a step.
        validate: measures the adapters as they are.
        distance: how far the model is from its base, which `preserve` weighs.
        class_offsets: makes `text_offsets` of `mpm_nce`, float [classes], from the training data;
            None adds nothing.
    """

    layer: Callable[[int, int | None], LinearAdapter] = LinearAdapter
    attached: Callable[[Adapters], None] = lambda adapters: None
    average: Callable[[Adapters, Recipe, int], Average] = moving_average
    drop: Callable[[Recipe, int, int], float] = constant_drop
    validate: Callable[..., dict[str, float]] = validate
    distance: Callable[[Base, Adapters, Accelerator, Tensor, Tensor], Tensor] = distance_of_images
    class_offsets: Callable[[Data], Tensor] | None = None


OWN = Parts()
