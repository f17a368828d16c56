"""Setup of a run before its first step (processes, model, adapters, data, loss and tracker), and
checkpoints from which a killed run continues to the same result.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer
from torchvision import transforms

from radapter_serve.adapter import (
    Adapter,
    Adapters,
    Form,
    Metadata,
    Site,
    attach,
    base_digest,
    find_sites,
    save_adapter,
)
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, encode_text, logit_scale_and_bias, templates_of
from radapter_serve.data.captions import Captioned
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import staged, write_text
from radapter_serve.sources import ADAPTER, CHECKPOINT, RECIPE, Adapt
from radapter_serve.training.batches import Examples, Position, Transform
from radapter_serve.training.data import Data, RunData
from radapter_serve.training.loss import mpm_nce, pairwise_sigmoid
from radapter_serve.training.recipe import Plan, Recipe

GLOO_SECONDS = 0.5  # for Gloo to free its memory before several processes end
# Fields of a recipe that may change when a run is resumed.
FREE = {
    "workers",
    "threads",
    "tracker",
    "save_every",
    "validate_every",
    "val_data",
    "form",
    "on_broken",
}


@dataclass(frozen=True)
class Prepared:
    """What a run starts from: its recipe, the base, the layers to adapt, and the data.

    `digest` is of the base's weights without adapters; `held_out` is a digest of the images that
    `val_fraction` holds out.
    """

    recipe: Recipe
    base: Base
    sites: Sequence[Site]
    digest: str
    data: Data
    val: Data | None
    held_out: str | None


@dataclass(frozen=True)
class Learner(Prepared):
    """The parts of a run of adapters in the towers: plan, adapters, optimizer, loss and examples.

    `towers` are both towers as accelerate wraps them; `loss_fn` takes embeddings of images and
    texts, and whether they belong together.
    """

    plan: Plan
    accelerator: Accelerator
    adapters: Adapters
    towers: nn.Module
    optimizer: Optimizer
    average: Average
    loss_fn: partial[Tensor]
    examples: Examples


def prepare(recipe: Recipe, opened: RunData) -> Prepared:
    """Load the base of a run, find the layers to adapt, and make its data ready."""
    # With embeddings and an adapter of the texts alone, nothing needs the image tower.
    only_texts = opened.embedded is not None and recipe.adapt == "text-projection"
    base = load_base(recipe.architecture, recipe.pretrained, images=not only_texts)
    data, val = opened.ready(recipe, base)
    sites = find_sites(base.model, adapt=recipe.adapt, partial=recipe.partial)
    width = int(base.config["embed_dim"])
    if recipe.of_projections and recipe.rank is not None and recipe.rank >= width:
        raise RAdapterError(
            f"rank is {recipe.rank}; allowed: less than the width {width}, or null for full rank"
        )
    held_out = held_out_digest(val) if val is not None and recipe.val_fraction else None
    digest = base_digest(base.model.state_dict(), [site.key for site in sites])
    return Prepared(recipe, base, sites, digest, data, val, held_out)


def build(recipe: Recipe, opened: RunData, out: Path) -> Learner:
    """Resolve the recipe and build all parts of the run; nothing is written."""
    recipe = with_precision(recipe)
    # The plan depends on the number of processes, and an invalid plan is refused before a model is
    # fetched.
    accelerator = start_accelerator(recipe, out)
    plan = recipe.resolved(len(opened.data.rows), accelerator.num_processes)
    recipe = plan.recipe
    torch.manual_seed(recipe.seed)  # before any random draw, such as of low-rank adapters
    prepared = prepare(recipe, opened)
    base = prepared.base
    refuse = recipe.on_broken == "refuse"

    # Attach the adapters.
    where: dict[str, Any] = {"adapt": recipe.adapt, "partial": recipe.partial}
    form = recipe.form
    if form == "auto":
        form = choose_form(base.model, recipe.rank, plan.part, **where)
    adapters = attach(base.model, recipe.rank, form=form, drop=recipe.drop, **where)
    if recipe.precision != "no":  # fp32 would gain little, and round differently
        flatten_projections(base.model)
    optimizer = AdamW(
        adapters.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    # Move the weights to their device, before the average copies them.
    towers, optimizer = accelerator.prepare(TwoTower(base.model, adapters), optimizer)

    return Learner(
        **vars(prepared),
        plan=plan,
        accelerator=accelerator,
        adapters=adapters,
        towers=towers,
        optimizer=optimizer,
        average=Average(adapters, plan.momentum, bias_correction=recipe.bias_correction),
        loss_fn=loss_of(base, recipe),
        examples=Examples(prepared.data, augmentation(base, recipe), recipe.seed, refuse=refuse),
    )


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe with the precision that `auto` takes on this machine."""
    if recipe.precision != "auto":
        return recipe
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dataclasses.replace(recipe, precision="bf16" if fast else "no")


def loss_of(base: Base, recipe: Recipe) -> partial[Tensor]:
    """The loss of a recipe: with a softmax, or with sigmoids if the base has them."""
    scale, bias = logit_scale_and_bias(base.model.state_dict())
    loss = partial(mpm_nce) if bias is None else partial(pairwise_sigmoid, logit_bias=bias)
    return partial(loss, logit_scale=scale, delta=recipe.delta, epsilon=recipe.epsilon)


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Write a run's recipe, and make its folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def write_adapter(
    prepared: Prepared,
    recipe: Recipe,
    tensors: Mapping[str, Tensor],
    metrics: Mapping[str, float],
    out: Path,
    **more: Any,
) -> Adapter:
    """Write a run's adapter, whose recipe has the α to recommend; `more` are further fields of its
    metadata.
    """
    data = prepared.data
    metadata = Metadata(
        architecture=prepared.base.name,
        pretrained=prepared.base.pretrained,
        base_digest=prepared.digest,
        rank=recipe.rank,
        task=recipe.task,
        alpha=recipe.alpha,
        templates=templates_of(recipe.templates),
        recipe=recipe.to_dict(),
        metrics=dict(metrics),
        classes=None if isinstance(data, Captioned) else list(data.classes),
        held_out=prepared.held_out,
        **more,
    )
    adapter = Adapter({name: t.float().cpu() for name, t in tensors.items()}, metadata)
    save_adapter(adapter, out / ADAPTER)
    return adapter


def choose_form(
    model: nn.Module,
    rank: int | None,
    batch_size: int,
    *,
    adapt: Adapt = "towers",
    partial: bool = False,
) -> Form:
    """The form of the adapters with fewer multiplications for a batch.

    The activation form has a cost for each token. The weight form has the cost of `F·W` once a
    step, and of the gradient of the adapted weight, which the activation form never needs.

    Args:
        model: an open_clip model.
        rank: rank of the adapters; None for full rank.
        batch_size: images of a step in each process.
        adapt: the place of the adapters.
        partial: leave out layers that cannot be adapted.
    """
    grid = getattr(model.visual, "grid_size", (14, 14))
    tokens = {True: batch_size * (grid[0] * grid[1] + 1), False: batch_size * 16}
    weight = activation = 0
    for site in find_sites(model, adapt=adapt, partial=partial):
        count = tokens[site.key.startswith("visual.")]
        width, inner = site.weight.shape
        weight += (
            4 * width * (width if rank is None else 2 * rank) * inner + 2 * count * width * inner
        )
        activation += 6 * count * width * (width if rank is None else 2 * rank)
    return "weight" if weight < activation else "activation"


def augmentation(base: Base, recipe: Recipe) -> Transform:
    """The paper's augmentation: a random resized crop, bicubic, and a flip if `recipe.flip`."""
    bicubic = transforms.InterpolationMode.BICUBIC
    scale = (recipe.crop_scale, 1.0)
    composed: Transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(base.preprocess["size"], scale, interpolation=bicubic),
            *([transforms.RandomHorizontalFlip()] if recipe.flip else []),
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.ToTensor(),
            transforms.Normalize(base.preprocess["mean"], base.preprocess["std"]),
        ]
    )
    return composed


def start_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """The processes, devices and precision of a run; refuses what is unavailable."""
    precision = recipe.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise RAdapterError("precision fp16 needs a GPU; allowed on this machine: no, bf16")
    # Let a second run in this process have another precision.
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            # Otherwise several processes on CPUs would not form a group.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.accumulate,
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            project_dir=out,
        )
    except ValueError as error:
        raise RAdapterError(f"tracker {recipe.tracker!r} can't be used: {reason(error)}") from error


def start_tracker(accelerator: Accelerator, recipe: Recipe) -> None:
    """Start the tracker, or refuse it before anything is written."""
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


def end_processes(accelerator: Accelerator) -> None:
    """End the tracker and the processes of a run, once all are done."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # Gloo's thread takes a lock to free the memory of the last gather. Destroying the process
        # group holds the same lock while it waits for that thread: too early, it would deadlock.
        time.sleep(GLOO_SECONDS)
    accelerator.end_training()


class TwoTower(nn.Module):
    """Both towers in one forward pass, for data parallelism to wrap."""

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pixels [B, 3, S, S] and tokens [B, L], both to float32 [B, D] of unit length."""
        with parametrize.cached():  # attention reads its weights more than once
            return encode_image(self.model, pixels), encode_text(self.model, tokens)


class Average:
    """Moving average `W̃ ← m·W̃ + (1−m)·W` after every step, in fp32, from the adapters' initial
    values.

    Args:
        adapters: the adapters to average.
        momentum: m in [0, 1).
        bias_correction: divide by `1−m^t`, so that the initial values have no weight. The paper
            does not, and with m = 0.999 a run of a few hundred steps then keeps almost nothing of
            the learned values.
    """

    def __init__(
        self, adapters: Adapters, momentum: float, *, bias_correction: bool = False
    ) -> None:
        self.adapters = adapters
        self.momentum = momentum
        self.bias_correction = bias_correction
        self.steps = 0
        self.tensors = {
            name: p.detach().float().clone() for name, p in adapters.named_tensors().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Add the adapters' present values; call it after every optimizer step."""
        self.steps += 1
        m = self.momentum
        if self.bias_correction:  # equals W̃/(1−m^t) of an average that starts at zero
            m = m * (1 - m ** (self.steps - 1)) / (1 - m**self.steps)
        for name, value in self.adapters.named_tensors().items():
            self.tensors[name].lerp_(value.float(), 1 - m)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the adapters to the average for the block, without adapter dropping."""
        kept = {name: p.detach().clone() for name, p in self.adapters.named_tensors().items()}
        self.adapters.stop_drop()
        self.adapters.load_tensors(self.tensors)
        try:
            yield
        finally:
            self.adapters.load_tensors(kept)

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restore the average of a checkpoint."""
        self.steps = steps
        for name, value in tensors.items():
            self.tensors[name].copy_(value)


def flatten_projections(model: nn.Module) -> None:
    """Make the in-projection of each `nn.MultiheadAttention` a product of two matrices.

    With `batch_first`, torch transposes its input [N, L, D] into a view [L, N, D], and multiplies
    the view as a batch of L matrices with L copies of the weight: in bf16 that took half of a step.
    A contiguous [L, N, D] is multiplied as one matrix [L·N, D]; the values are the same.
    """

    def contiguous(attention: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        query = args[0]
        if query.dim() != 3 or any(other is not query for other in args[1:3]):
            return None  # cross-attention is left as it is
        rows = query.transpose(0, 1).contiguous().transpose(0, 1)
        return (rows, rows, rows, *args[3:])

    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.batch_first:
            module.register_forward_pre_hook(contiguous)


def save_checkpoint(out: Path, learner: Learner, step: int, position: Position) -> None:
    """Save the state after a step atomically; every process calls it with its next position."""
    accelerator = learner.accelerator
    positions = gather_object([position])
    if not accelerator.is_main_process:
        return
    adapters = learner.adapters.named_tensors().items()
    state = {
        "recipe": _fixed(learner.recipe),
        "adapters": {name: value.detach().cpu() for name, value in adapters},
        "average": {name: value.cpu() for name, value in learner.average.tensors.items()},
        "average_steps": learner.average.steps,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "step": step,
        "positions": positions,
        "held_out": learner.held_out,
    }
    try:
        with staged(out / CHECKPOINT) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:
        raise RAdapterError(
            f"could not write {out / CHECKPOINT}: {error}; the last whole checkpoint is kept"
        ) from error


def load_checkpoint(out: Path, learner: Learner) -> tuple[int, Position]:
    """Restore a checkpoint of the same recipe and data; returns the step and next position."""
    path = out / CHECKPOINT
    if not path.is_file():
        raise RAdapterError(f"no checkpoint at {path}; leave --resume out to start a run")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        old = state["recipe"]
    except Exception as error:  # a damaged file raises anything
        raise RAdapterError(
            f"{path} is not a whole checkpoint ({reason(error)}); remove it and start again"
        ) from error
    recipe = learner.recipe
    changed = [
        f"{k} was {old.get(k)!r}, is {v!r}" for k, v in _fixed(recipe).items() if old.get(k) != v
    ]
    if changed:
        raise RAdapterError(
            f"{path} belongs to another recipe: {'; '.join(changed)}; use the old values or a new"
            " --out"
        )
    if state["held_out"] != learner.held_out:
        raise RAdapterError(
            f"{recipe.data} has changed since {path} was written: the share that val_fraction draws"
            " now holds images that the run was trained with; bring back the files as they were,"
            " or start again with a new --out"
        )
    accelerator = learner.accelerator
    learner.adapters.load_tensors(state["adapters"])
    learner.average.load(state["average"], state["average_steps"])
    learner.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    positions = state["positions"]
    epoch, batch = positions[accelerator.process_index % len(positions)]
    return int(state["step"]), (int(epoch), int(batch))


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """Fields of a recipe that must be the same to resume a run."""
    return {name: value for name, value in recipe.to_dict().items() if name not in FREE}
