"""What a run needs before its first step: its folder, processes, batches, augmentation and the form
of the adapters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torchvision import transforms

from radapter_serve.adapter import Form, find_sites
from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.training.batches import Transform
from radapter_serve.training.recipe import Recipe


def choose_form(
    model: nn.Module, rank: int | None, batch_size: int, *, text: bool = True, partial: bool = False
) -> Form:
    """The form of the adapters that costs less for a batch, by its multiplications.

    The activation form pays by the token; the weight form pays for `F·W` once a step, and for the
    gradient of the weight that the adapter changes, which the activation form never needs.

    Args:
        model: an open_clip model.
        rank: of the adapters; None is full.
        batch_size: images a step and process.
        text: whether the text tower has adapters.
        partial: whether only what can be adapted is.
    """
    grid = getattr(model.visual, "grid_size", (14, 14))
    tokens = {True: batch_size * (grid[0] * grid[1] + 1), False: batch_size * 16}
    weight = activation = 0
    for site in find_sites(model, text=text, partial=partial):
        count = tokens[site.key.startswith("visual.")]
        width = site.layer.out_features
        inner = site.layer.in_features
        weight += (
            4 * width * (width if rank is None else 2 * rank) * inner + 2 * count * width * inner
        )
        activation += 6 * count * width * (width if rank is None else 2 * rank)
    return "weight" if weight < activation else "activation"


def augmentation(base: Base, recipe: Recipe) -> Transform:
    """The paper's augmentation: a random resized crop, bicubic, and for few-shot a flip."""
    size = base.preprocess["size"]
    crop = transforms.RandomResizedCrop(
        size, scale=(recipe.crop_scale, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
    )
    flip = [transforms.RandomHorizontalFlip()] if recipe.flip else []
    normalize = transforms.Normalize(base.preprocess["mean"], base.preprocess["std"])
    rgb = transforms.Lambda(lambda image: image.convert("RGB"))
    composed: Transform = transforms.Compose([crop, *flip, rgb, transforms.ToTensor(), normalize])
    return composed


def start_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """The processes, devices and precision of a run; refuses a precision or a tracker that is not
    to be had.
    """
    precision = recipe.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise RAdapterError("precision fp16 needs a GPU; allowed on this machine: no, bf16")
    # else a second run in this process could not have another precision
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            # else several processes on CPUs would not know of each other
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.accumulate,
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            project_dir=out,
        )
    except ValueError as error:
        raise RAdapterError(f"tracker {recipe.tracker!r} can't be used: {reason(error)}") from error


def start_tracker(accelerator: Accelerator, recipe: Recipe) -> None:
    """Start what draws the curves, the first thing that writes."""
    if recipe.tracker == "none":
        return
    if not accelerator.log_with:  # accelerate only warns
        raise RAdapterError(
            f"tracker {recipe.tracker} is not installed: pip install {recipe.tracker}"
        )
    try:
        accelerator.init_trackers(
            "radapter", config={k: str(v) for k, v in recipe.to_dict().items()}
        )
    except Exception as error:  # each tracker raises its own kinds: not logged in, offline
        raise RAdapterError(f"tracker {recipe.tracker} does not start: {reason(error)}") from error
