"""What a run needs before its first step: processes, model, adapters, data, loss and tracker."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchvision import transforms

from radapter_serve.adapter import Adapters, Form, attach, base_digest, find_sites
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import logit_scale_and_bias
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.training.batches import Examples, Transform
from radapter_serve.training.loss import mpm_nce, pairwise_sigmoid
from radapter_serve.training.recipe import Plan, Recipe
from radapter_serve.training.step import Average, TwoTower, flatten_projections
from radapter_serve.training.tasks import Data, RunData


@dataclass(frozen=True)
class Learner:
    """What learns, and what it learns from.

    The digest is of the base's weights without the adapters; `towers` are both, as accelerate wraps
    them; `loss_fn` takes images, texts, and which of them belong together; `held_out` is a digest
    of the images that `val_fraction` keeps from training.
    """

    plan: Plan
    accelerator: Accelerator
    base: Base
    digest: str
    adapters: Adapters
    form: Form
    towers: nn.Module
    optimizer: Optimizer
    average: Average
    loss_fn: partial[Tensor]
    data: Data
    examples: Examples
    val: Data | None
    held_out: str | None


def build(recipe: Recipe, opened: RunData, out: Path) -> Learner:
    """Resolve the recipe and build all that it names; nothing is written."""
    # The order matters: the number of processes says what the recipe comes to, which is refused
    # before a model is fetched.
    recipe = with_precision(recipe)
    accelerator = start_accelerator(recipe, out)
    plan = recipe.resolved(opened.images, accelerator.num_processes)
    recipe = plan.recipe
    torch.manual_seed(recipe.seed)  # before anything draws: a base without weights, low-rank starts
    base = load_base(recipe.architecture, recipe.pretrained)
    data, val = opened.ready(recipe, base)
    refuse = recipe.on_broken == "refuse"

    # Adapters: the digest is of the weights without them.
    where: dict[str, Any] = {"text": recipe.adapt_text, "partial": recipe.partial}
    sites = find_sites(base.model, **where)
    digest = base_digest(base.model.state_dict(), [site.key for site in sites])
    form = recipe.form
    if form == "auto":
        form = choose_form(base.model, recipe.rank, plan.part, **where)
    adapters = attach(base.model, recipe.rank, form=form, drop=recipe.drop, **where)
    if recipe.precision != "no":  # fp32 gains little by it, and would round otherwise
        flatten_projections(base.model)
    optimizer = AdamW(adapters.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    # This moves the weights to their device, where the average then starts.
    towers, optimizer = accelerator.prepare(TwoTower(base.model, adapters), optimizer)
    return Learner(
        plan=plan,
        accelerator=accelerator,
        base=base,
        digest=digest,
        adapters=adapters,
        form=form,
        towers=towers,
        optimizer=optimizer,
        average=Average(adapters, plan.momentum, bias_correction=recipe.bias_correction),
        loss_fn=choose_loss(base, recipe),
        data=data,
        examples=Examples(data, augmentation(base, recipe), recipe.seed, refuse=refuse),
        val=val,
        held_out=held_out_digest(val) if val is not None and recipe.val_fraction else None,
    )


def choose_loss(base: Base, recipe: Recipe) -> partial[Tensor]:
    """The loss by softmax, or by sigmoids where the base's scores are made so."""
    scale, bias = logit_scale_and_bias(base.model.state_dict())
    numbers: dict[str, Any] = {
        "logit_scale": scale,
        "delta": recipe.delta,
        "epsilon": recipe.epsilon,
    }
    if bias is None:
        return partial(mpm_nce, **numbers)
    return partial(pairwise_sigmoid, logit_bias=bias, **numbers)


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


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe with the precision of this machine in place of `auto`."""
    if recipe.precision != "auto":
        return recipe
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dataclasses.replace(recipe, precision="bf16" if fast else "no")


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
