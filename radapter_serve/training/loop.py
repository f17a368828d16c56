"""The training loop, on accelerate: one process or many, CPU or GPU, any precision."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer

from radapter_serve.adapter import Adapters, Metadata, attach, base_digest, find_sites, save_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.prompts import templates_of
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.data import Captioned
from radapter_serve.data.held_out import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.training.average import Average
from radapter_serve.training.batches import Examples, batches
from radapter_serve.training.checkpoint import load_checkpoint, save_checkpoint
from radapter_serve.training.interruption import Interruption
from radapter_serve.training.loss import gather_with_grad, mpm_nce
from radapter_serve.training.parts import OWN, Parts
from radapter_serve.training.progress import Progress
from radapter_serve.training.recipe import RECIPE, Recipe
from radapter_serve.training.setup import (
    augmentation,
    choose_form,
    start_accelerator,
    start_tracker,
)
from radapter_serve.training.tasks import Data, RunData
from radapter_serve.training.validation import validate

# The parts of batches, each with the (epoch, batch or row) that comes after it
Source = Iterator[tuple[tuple[int, int], dict[str, Any]]]


class TwoTower(nn.Module):
    """Both towers in one forward pass, which is what data parallelism wraps."""

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.model, self.adapters = model, adapters

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds pixels [B, 3, S, S] and tokens [B, L], both to float32 [B, D] of unit length."""
        with parametrize.cached():  # attention reads its weights more than once
            return encode_image(self.model, pixels), encode_text(self.model, tokens)


def train_on(recipe: Recipe, opened: RunData, out: Path, parts: Parts = OWN) -> Path:
    """`start.train` once the recipe and the data are known to be all right."""
    run = _prepare(recipe, opened, out, parts)
    _start(run)
    with Progress(
        run.accelerator, run.out, run.steps, run.recipe.batch_size, done=run.step
    ) as progress:
        progress.say(run.description())
        for note in run.notes:
            progress.say(note)
        progress.broken(run.broken)
        with Interruption(progress.say) as interruption:
            _learn(run, progress, interruption)
        metrics = _validate(run, progress)
        progress.end()
        _write_adapter(run, metrics, progress)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return run.out


@dataclass
class _Run:
    """All that a run consists of.

    Attributes:
        recipe: as the user gave it.
        schedule: the same, with the warm-up and the averaging that this run has.
        part: images a process and accumulated part.
        digest: of the base without adapters.
        held_out: digest of the images that are validated on and else would be trained on; None
            where there are none.
        steps: of the whole run.
        step, position: steps done, and the (epoch, batch or row) that comes next.
        broken: images that were left out when the data was opened.
        notes: what a user should know before the first step, a line each.
        parts: what an ablation exchanges.
    """

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    base: Base
    data: Data
    val: Data | None
    part: int
    digest: str
    held_out: str | None
    adapters: Adapters
    form: str
    towers: nn.Module
    optimizer: Optimizer
    average: Average
    schedule: Recipe
    steps: int
    broken: list[str]
    notes: tuple[str, ...]
    parts: Parts
    step: int = 0
    position: tuple[int, int] = (0, 0)
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = float(self.base.model.state_dict()["logit_scale"].exp())

    def description(self) -> str:
        """One line for the user."""
        rank = "full rank" if self.recipe.rank is None else f"rank {self.recipe.rank}"
        processes = self.accelerator.num_processes
        return (
            f"{self.adapters.share(self.base.model)}, {rank}, in {self.form} form; "
            f"{self.steps} steps of {self.recipe.batch_size} images"
            + (f" in {processes} processes" if processes > 1 else "")
        )

    def save(self) -> None:
        """Write a checkpoint; every process calls it."""
        save_checkpoint(
            self.out,
            self.recipe,
            self.adapters,
            self.average,
            self.optimizer,
            self.accelerator,
            self.step,
            self.position,
            self.held_out,
        )


def _prepare(given: Recipe, opened: RunData, out: Path, exchanged: Parts) -> _Run:
    """Open and attach everything; whatever is refused is refused here, before anything is
    written.
    """
    accelerator = start_accelerator(given, out)
    torch.manual_seed(given.seed)
    parts = given.accumulate * accelerator.num_processes
    recipe = given.fitted(None if given.streaming else len(opened.data.rows), parts)
    part = recipe.batch_size // parts
    steps = recipe.steps or recipe.epochs * (len(opened.data.rows) // recipe.batch_size)
    schedule = recipe.of_length(steps)
    base = load_base(recipe.architecture, recipe.pretrained)
    data, val = opened.ready(recipe, base)
    held_out = held_out_digest(val) if val is not None and recipe.val_fraction else None
    where = {"text": recipe.adapt_text, "partial": recipe.partial}
    digest = base_digest(
        base.model.state_dict(), [site.key for site in find_sites(base.model, **where)]
    )
    form = recipe.form
    if form == "auto":
        form = choose_form(base.model, recipe.rank, part, **where)
    adapters = attach(
        base.model, recipe.rank, form=form, drop=recipe.drop, make=exchanged.layer, **where
    )
    exchanged.attached(adapters)
    optimizer = AdamW(
        adapters.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    towers, optimizer = accelerator.prepare(TwoTower(base.model, adapters), optimizer)
    average = exchanged.average(adapters, schedule, steps)
    run = _Run(
        recipe,
        out,
        accelerator,
        base,
        data,
        val,
        part,
        digest,
        held_out,
        adapters,
        form,
        towers,
        optimizer,
        average,
        schedule,
        steps,
        list(opened.broken),
        (*opened.notes, *schedule.notes(given, steps)),
        exchanged,
    )
    if recipe.resume:
        run.step, run.position = load_checkpoint(
            out, recipe, adapters, average, optimizer, accelerator, held_out
        )
    return run


def _start(run: _Run) -> None:
    """Make the run's folder with its recipe."""
    if run.accelerator.is_main_process:
        run.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(run.recipe.to_dict(), sort_keys=False)
        (run.out / RECIPE).write_text(text, encoding="utf-8")
    start_tracker(run.accelerator, run.recipe)


def _learn(run: _Run, progress: Progress, interruption: Interruption) -> None:
    """All steps that are left, with the checkpoints and the validations between them."""
    recipe = run.recipe
    examples = Examples(
        run.data, augmentation(run.base, recipe), recipe.seed, refuse=recipe.on_broken == "refuse"
    )
    source = _endless(examples, run.part, run.position, run.accelerator, recipe.workers)
    while run.step < run.steps:
        started = time.perf_counter()
        rate = learning_rate(run.schedule, run.step, run.steps)
        loss = _step(run, source, rate, progress)
        progress.step(run.step, loss, rate, time.perf_counter() - started)
        if not math.isfinite(loss):
            raise RAdapterError(
                f"the loss is {loss} at step {run.step}; lower --learning-rate or --precision no"
            )
        stop = interruption.asked(run.accelerator)
        if stop or (
            recipe.save_every and (run.step % recipe.save_every == 0 or run.step == run.steps)
        ):
            run.save()
        if stop:
            progress.say(
                f"saved a checkpoint after step {run.step}; continue with radapter-train --resume"
                f" {run.out}"
            )
            interruption.end()
        if recipe.validate_every and run.step % recipe.validate_every == 0 and run.step < run.steps:
            _validate(run, progress)


def _step(run: _Run, source: Source, rate: float, progress: Progress) -> float:
    """One optimizer step over all parts of its batch; returns the mean loss."""
    recipe, accelerator, optimizer = run.recipe, run.accelerator, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(
        recipe.seed * 1_000_003 + run.step
    )  # all that a step draws, so that a resumed run draws the same
    run.adapters.drop = run.parts.drop(recipe, run.step, run.steps)
    run.adapters.sample_drop()
    loss_sum = 0.0
    for _ in range(recipe.accumulate):
        run.position, batch = next(source)
        with accelerator.accumulate(run.towers):
            loss = _loss(run, batch)
            accelerator.backward(loss * accelerator.num_processes)  # see gather_with_grad
            if recipe.grad_clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.adapters.parameters(), recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.item()
        progress.broken(batch["broken"])
    run.average.update()
    run.step += 1
    return loss_sum / recipe.accumulate


def _loss(run: _Run, batch: dict[str, Any]) -> Tensor:
    """The loss of one part over the pairs of all processes."""
    device = run.accelerator.device
    tokens = run.base.tokenizer(batch["texts"]).to(device)
    images, texts = run.towers(batch["pixels"].to(device, non_blocking=True), tokens)
    labels = run.accelerator.gather(batch["labels"].to(device))
    # each image stands beside each of its texts: but for a constant that is the loss of one image
    # with several texts, because all images come equally often
    several = len(texts) // len(images)
    labels = labels.repeat_interleave(several)
    return mpm_nce(
        gather_with_grad(images).repeat_interleave(several, dim=0),
        gather_with_grad(texts),
        labels if run.recipe.positives == "several" else torch.arange(len(labels), device=device),
        logit_scale=run.scale,
        delta=run.recipe.delta,
        epsilon=run.recipe.epsilon,
    )


def _validate(run: _Run, progress: Progress) -> dict[str, float]:
    """Measure the average as it is now; nothing without validation data."""
    if run.val is None:
        return {}
    with run.average.applied():
        metrics = validate(run.base, run.adapters, run.val, run.recipe, run.accelerator)
    progress.metrics(run.step, metrics)
    return metrics


def _write_adapter(run: _Run, metrics: dict[str, float], progress: Progress) -> None:
    """Write the average as the run's adapter, from the main process."""
    if not run.accelerator.is_main_process:
        return
    recipe, path = run.recipe, run.out / "adapter.safetensors"
    run.adapters.load_tensors(run.average.tensors)
    metadata = Metadata(
        architecture=run.base.name,
        pretrained=run.base.pretrained,
        base_digest=run.digest,
        rank=recipe.rank,
        task=recipe.task,
        alpha=recipe.alpha,
        templates=templates_of(recipe.templates),
        recipe=recipe.to_dict(),
        metrics=metrics,
        classes=None if isinstance(run.data, Captioned) else list(run.data.classes),
        held_out=run.held_out,
    )
    save_adapter(run.adapters.adapter(metadata), path)
    folder = shlex.quote(str(run.out))
    chosen = f"radapter-export --adapter {folder} --alpha {recipe.alpha}"
    following = chosen if run.val is None else f"radapter-eval --adapter {folder} --alpha auto"
    progress.say(f"wrote {path}; next: {following}")


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to the least rate.

    Args:
        recipe: with warm-up steps, as `Recipe.of_length` gives it.
        step: from 0.
        steps: of the run.
    """
    assert recipe.warmup_steps is not None
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return (
        recipe.min_learning_rate
        + (recipe.learning_rate - recipe.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def _endless(
    examples: Examples, part: int, position: tuple[int, int], accelerator: Accelerator, workers: int
) -> Source:
    """The parts of all epochs, without an end."""
    epoch, start = position
    while True:
        offset = start
        loader = batches(
            examples,
            part,
            epoch=epoch,
            start=start,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=workers,
        )
        for offset, batch in enumerate(loader, start + 1):
            if "error" in batch:
                raise RAdapterError(batch["error"])
            yield (epoch, batch["row"] or offset), batch  # a stream continues after its last row
        if offset == start == 0:
            raise RAdapterError(
                f"the data set has fewer images that can be read than a batch of {part}"
            )
        epoch, start = epoch + 1, 0
