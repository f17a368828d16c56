"""R-Adapter by the package's training, the base itself, and R-Adapter with the regularizers of
Table 5: dropout, drop path, and dropping by token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from radapter_serve import training
from radapter_serve.adapter import (
    Adapters,
    Metadata,
    attach,
    base_digest,
    find_sites,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, templates_of
from radapter_serve.data.captions import Captioned
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.files import read_yaml
from radapter_serve.process import limit_threads
from radapter_serve.sources import ADAPTER
from radapter_serve.training import Average, Recipe, choose_form
from radapter_serve.training.batches import Examples, endless
from radapter_serve.training.loop import at_base, other_prompts
from radapter_serve.training.loss import distance_to_base, positives_of
from radapter_serve.training.recipe import ready_recipes, recipe_from
from radapter_serve.training.setup import (
    TwoTower,
    augmentation,
    choose_loss,
    start_accelerator,
    with_precision,
)
from radapter_serve.training.start import run_folder
from radapter_serve.training.tasks import open_run
from rivals.method import Cost, Learned, Meter, Method, Run, System


@dataclass(frozen=True)
class Variant:
    """Probabilities of dropping in training, in [0, 1): a number of an adapter's output (DO of
    Table 5), a residual branch of an adapted block for an image or a text (DP), and an adapter at a
    token position of the whole batch, as in the authors' code.
    """

    dropout: float = 0.0
    drop_path: float = 0.0
    token_drop: float = 0.0

    @property
    def needs_outputs(self) -> bool:
        """Whether adapters must compute outputs, which the weight form does not."""
        return bool(self.dropout or self.token_drop)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose adapters have no outputs, if this variant needs them."""
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


OWN = Variant()  # changes nothing


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
    """Drop each residual branch of the adapted blocks with probability p, in training."""

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


def train_variant(recipe: str | Recipe, variant: Variant, **fields: Any) -> training.Run:
    """Train with the adapters of a variant: a copy of the loop of `radapter_serve.train`, in one
    process, without checkpoints and validation.
    """
    recipe = recipe_from(recipe, **fields)
    recipe.check()
    variant.check(recipe)
    limit_threads(recipe.threads)
    recipe = with_precision(recipe)
    out = run_folder(recipe)
    opened = open_run(recipe, progress=False)
    accelerator = start_accelerator(recipe, out)
    device = accelerator.device
    plan = recipe.resolved(opened.images)
    recipe = plan.recipe

    # Build the model, its adapters and the optimizer.
    torch.manual_seed(recipe.seed)
    base = load_base(recipe.architecture, recipe.pretrained)
    data, val = opened.ready(recipe, base)
    where = {"text": recipe.adapt_text, "partial": recipe.partial}
    sites = find_sites(base.model, **where)
    digest = base_digest(base.model.state_dict(), [site.key for site in sites])
    form = recipe.form
    if form == "auto":
        form = choose_form(base.model, recipe.rank, plan.part, **where)
    if variant.needs_outputs:
        form = "activation"
    adapters = variant.attach(base.model, recipe.rank, form=form, drop=recipe.drop, **where)
    optimizer = AdamW(adapters.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    towers, optimizer = accelerator.prepare(TwoTower(base.model, adapters), optimizer)
    average = Average(adapters, plan.momentum, bias_correction=recipe.bias_correction)
    loss_fn = choose_loss(base, recipe)
    examples = Examples(
        data, augmentation(base, recipe), recipe.seed, refuse=recipe.on_broken == "refuse"
    )
    source = endless(examples, plan.part, workers=recipe.workers)
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        adapters.sample_drop()
        for _ in range(recipe.accumulate):
            _, batch = next(source)
            with accelerator.accumulate(towers):
                # Embed the batch, and prompts of classes that it lacks.
                labels = batch["of_images"].to(device)
                others: dict[int, str] = {}
                if recipe.negative_classes:
                    assert not isinstance(data, Captioned)  # the recipe refuses it
                    draw = random.Random(f"{recipe.seed}-{step}")
                    present = labels.unique().tolist()
                    others = other_prompts(data, present, recipe.negative_classes, draw)
                tokens = base.tokenizer([*batch["texts"], *others.values()]).to(device)
                pixels = batch["pixels"].to(device, non_blocking=True)
                images, texts = towers(pixels, tokens)

                # Find the positives of each image.
                several = recipe.captions_per_image
                labels = labels.repeat_interleave(several, dim=0)
                positive = torch.eye(len(labels), dtype=torch.bool, device=device)
                if recipe.positives == "several":
                    positive = positives_of(labels, labels[:, 0])
                positive = F.pad(positive, (0, len(others)))

                loss = loss_fn(images.repeat_interleave(several, dim=0), texts, positive)
                if recipe.preserve:
                    with at_base(adapters, accelerator):
                        base_images = encode_image(base.model, pixels)
                    moved = distance_to_base(images, accelerator.gather(base_images))
                    loss = loss + recipe.preserve * moved
                accelerator.backward(loss)
                if recipe.grad_clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(adapters.parameters(), recipe.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
            if not math.isfinite(loss.item()):
                raise RAdapterError(
                    f"the loss is {loss.item()} at step {step}; lower the learning rate"
                )
        average.update()

    adapters.load_tensors(average.tensors)
    metadata = Metadata(
        architecture=base.name,
        pretrained=base.pretrained,
        base_digest=digest,
        rank=recipe.rank,
        task=recipe.task,
        alpha=recipe.alpha,
        templates=templates_of(recipe.templates),
        recipe=recipe.to_dict(),
        classes=None if isinstance(data, Captioned) else list(data.classes),
        held_out=held_out_digest(val) if val is not None and recipe.val_fraction else None,
    )
    out.mkdir(parents=True, exist_ok=True)
    save_adapter(adapters.adapter(metadata), out / ADAPTER)
    return training.Run(out, recipe, {}, (*opened.notes, *plan.notes))


# Fields of a ready recipe that the run sets, whatever learns.
OF_THE_DATA = ("task", "architecture", "pretrained", "classes", "shots", "seed", "precision")


class ZeroShot(Method):
    """The base; nothing learns."""

    def start(self, run: Run) -> System:
        return System(run.base)

    def learn(self, run: Run) -> Learned:
        return Learned(self.start(run), Cost())


@dataclass(frozen=True)
class RAdapter(Method):
    """R-Adapter, whose end is the adapter folded at α = 1: the line is the paper's re-scaling."""

    alpha: float | None = 0.5
    variant: Variant = OWN

    def start(self, run: Run) -> System:
        return System(run.base)

    def learn(self, run: Run) -> Learned:
        with tempfile.TemporaryDirectory() as folder:
            meter = Meter()
            recipe = dataclasses.replace(
                run.recipe, out=Path(folder) / "run", save_every=None, tracker="none"
            )
            plain = self.variant == OWN
            trained = training.train(recipe) if plain else train_variant(recipe, self.variant)
            adapter = load_adapter(trained)
            cost = meter.cost(sum(tensor.numel() for tensor in adapter.tensors.values()))
        system = self.start(run)
        system.model.load_state_dict(fold(run.base.model.state_dict(), adapter, 1.0))
        return Learned(system, cost)


def r_adapter(
    recipe: str,
    alpha: float | None = 0.5,
    variant: Variant = OWN,
    **changes: Any,
) -> RAdapter:
    """Build R-Adapter by a ready recipe with changed fields; None as α is no re-scaling."""
    values: Mapping[str, Any] = read_yaml(ready_recipes()[recipe], "the recipe")
    settings = {name: value for name, value in values.items() if name not in OF_THE_DATA}
    # None is the recipe's value in a run of full length, and follows the length of a shorter one.
    follow = {name: None for name in ("momentum", "warmup_steps") if settings.get(name)}
    return RAdapter({**settings, **follow, **changes}, alpha, variant)
