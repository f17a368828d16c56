"""The training loop, on accelerate: one process or many, CPU or GPU, any precision."""

from __future__ import annotations

import math
import random
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW

from radapter_serve.adapter import (
    Adapters,
    Form,
    Metadata,
    attach,
    base_digest,
    find_sites,
    save_adapter,
)
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.prompts import templates_of
from radapter_serve.clip.towers import encode_image, encode_text, logit_scale_and_bias
from radapter_serve.data import Captioned
from radapter_serve.data.held_out import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.runs import ADAPTER, RECIPE
from radapter_serve.training.batches import NO_LABEL, Examples, batches
from radapter_serve.training.checkpoint import Learner, load_checkpoint, save_checkpoint
from radapter_serve.training.interruption import Interruption
from radapter_serve.training.loss import (
    gather_with_grad,
    mpm_nce,
    pairwise_sigmoid,
    positives_of,
)
from radapter_serve.training.negatives import other_prompts, share
from radapter_serve.training.parts import OWN, Parts
from radapter_serve.training.progress import Progress
from radapter_serve.training.recipe import Recipe
from radapter_serve.training.run import Run
from radapter_serve.training.setup import (
    augmentation,
    choose_form,
    start_accelerator,
    start_tracker,
)
from radapter_serve.training.tasks import Data, RunData

_FREED_SECONDS = 0.5  # for Gloo to free what it holds when several processes end

# The parts of batches, each with the (epoch, batch or row) that comes after it
Source = Iterator[tuple[tuple[int, int], dict[str, Any]]]


class TwoTower(nn.Module):
    """Both towers in one forward pass, which is what data parallelism wraps."""

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds pixels [B, 3, S, S] and tokens [B, L], both to float32 [B, D] of unit length."""
        with parametrize.cached():  # attention reads its weights more than once
            return encode_image(self.model, pixels), encode_text(self.model, tokens)


def train_on(
    recipe: Recipe, opened: RunData, out: Path, parts: Parts = OWN, *, show: bool = True
) -> Run:
    """`start.train` once the recipe and the data are known to be all right."""
    run = _prepare(recipe, opened, out, parts)
    _start(run)
    with Progress(
        run.accelerator,
        run.out,
        run.schedule.steps,
        run.recipe.batch_size,
        done=run.step,
        show=show,
    ) as progress:
        if run.step < run.schedule.steps:
            progress.say(run.description())
        else:
            progress.say(
                f"{out} was finished already, after step {run.step} of {run.schedule.steps}; this"
                " trains nothing, and only validates and writes its adapter again"
            )
        for note in run.notes:
            progress.say(note)
        progress.broken(list(opened.broken))
        with Interruption(progress.say) as interruption:
            _learn(run, progress, interruption)
        metrics = _validate(run, progress)
        progress.end()
        _write_adapter(run, metrics, progress)
    end_processes(run.accelerator)
    return Run(run.out, run.recipe, metrics, (*run.notes, *progress.notes))


def end_processes(accelerator: Accelerator, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for all processes of a run, and part from them.

    Args:
        accelerator: of the run.
        sleep: waits so many seconds, without the interpreter's lock.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # Gloo's thread takes the lock to free what the last gather held. Whoever frees the process
        # group holds the lock and waits for that thread: too early, and both wait for ever.
        sleep(_FREED_SECONDS)
    accelerator.end_training()


@dataclass(frozen=True)
class _Model:
    """What learns.

    Attributes:
        base: with the adapters attached.
        digest: of the base without them.
        adapters: what is trained.
        form: that they are applied in.
        towers: both, as accelerate wraps them.
        scale: 1/τ of the base.
        bias: that the base adds to logits, where its scores are sigmoids; None for a softmax.
    """

    base: Base
    digest: str
    adapters: Adapters
    form: Form
    towers: nn.Module
    scale: float
    bias: float | None


@dataclass(frozen=True)
class _Pairs:
    """What it learns from.

    Attributes:
        train, val: the pairs of training and of validation; the latter may be None.
        held_out: digest of the images that are validated on and else would be trained on; None
            where there are none.
    """

    train: Data
    val: Data | None
    held_out: str | None


@dataclass(frozen=True)
class _Schedule:
    """How long it learns, and how fast.

    Attributes:
        recipe: with the batch, the warm-up and the averaging that this run has.
        steps: of the whole run.
        part: images a process and accumulated part.
    """

    recipe: Recipe
    steps: int
    part: int

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        return learning_rate(self.recipe, step, self.steps)


@dataclass
class _Run:
    """A run, and how far it is.

    Attributes:
        recipe: as the user gave it, with a batch that the data can fill.
        notes: what a user should know before the first step, a line each.
        parts: what an ablation exchanges.
        step, position: steps done, and the (epoch, batch or row) that comes next.
    """

    recipe: Recipe
    out: Path
    model: _Model
    pairs: _Pairs
    schedule: _Schedule
    learner: Learner
    parts: Parts
    notes: tuple[str, ...]
    step: int = 0
    position: tuple[int, int] = (0, 0)

    @property
    def accelerator(self) -> Accelerator:
        """The processes that share the run."""
        return self.learner.accelerator

    def description(self) -> str:
        """One line for the user."""
        rank = "full rank" if self.recipe.rank is None else f"rank {self.recipe.rank}"
        processes = self.accelerator.num_processes
        return (
            f"{self.model.adapters.summary(self.model.base.model)}, {rank}, in {self.model.form}"
            f" form; {self.schedule.steps} steps of {self.recipe.batch_size} images"
            + (f" in {processes} processes" if processes > 1 else "")
            + ("" if self.model.bias is None else "; pairwise sigmoid loss, as the base is scored")
        )

    def save(self) -> None:
        """Write a checkpoint; every process calls it."""
        save_checkpoint(
            self.out,
            self.recipe,
            self.learner,
            step=self.step,
            position=self.position,
            held_out=self.pairs.held_out,
        )


def _prepare(given: Recipe, opened: RunData, out: Path, exchanged: Parts) -> _Run:
    """Open and attach everything; whatever is refused is refused here, before anything is
    written.
    """
    # The order matters: each step below needs what those above it did.
    accelerator = start_accelerator(given, out)  # says how many processes share a batch
    torch.manual_seed(given.seed)  # before anything draws: a base without weights, low-rank starts
    schedule, recipe = _schedule(given, opened, accelerator)  # before a model is fetched
    base = load_base(recipe.architecture, recipe.pretrained)
    pairs = _pairs(recipe, opened, base)
    where = {"text": recipe.adapt_text, "partial": recipe.partial}
    # The digest is of the weights without adapters, so it comes before they are attached.
    sites = find_sites(base.model, **where)
    digest = base_digest(base.model.state_dict(), [site.key for site in sites])
    form = recipe.form
    if form == "auto":
        form = choose_form(base.model, recipe.rank, schedule.part, **where)
    adapters = attach(
        base.model, recipe.rank, form=form, drop=recipe.drop, make=exchanged.layer, **where
    )
    exchanged.attached(adapters)  # may change what the optimizer is given
    optimizer = AdamW(adapters.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    # This moves the weights to their device, where the average then starts.
    towers, optimizer = accelerator.prepare(TwoTower(base.model, adapters), optimizer)
    average = exchanged.average(adapters, schedule.recipe, schedule.steps)
    scale, bias = logit_scale_and_bias(base.model.state_dict())
    model = _Model(
        base=base,
        digest=digest,
        adapters=adapters,
        form=form,
        towers=towers,
        scale=scale,
        bias=bias,
    )
    run = _Run(
        recipe=recipe,
        out=out,
        model=model,
        pairs=pairs,
        schedule=schedule,
        learner=Learner(adapters, average, optimizer, accelerator),
        parts=exchanged,
        notes=(*opened.notes, *schedule.recipe.notes(given, schedule.steps)),
    )
    if recipe.resume:  # last: it replaces the starts of adapters, average and optimizer
        run.step, run.position = load_checkpoint(out, recipe, run.learner, pairs.held_out)
    return run


def _schedule(given: Recipe, opened: RunData, accelerator: Accelerator) -> tuple[_Schedule, Recipe]:
    """The schedule of a run, and its recipe with a batch that the data can fill."""
    parts = given.accumulate * accelerator.num_processes
    images = None if given.streaming else len(opened.data.rows)
    recipe = given.fitted(images, parts)
    steps = recipe.length(images)
    return _Schedule(recipe.of_length(steps), steps, recipe.batch_size // parts), recipe


def _pairs(recipe: Recipe, opened: RunData, base: Base) -> _Pairs:
    train, val = opened.ready(recipe, base)
    held_out = held_out_digest(val) if val is not None and recipe.val_fraction else None
    return _Pairs(train, val, held_out)


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
    steps = run.schedule.steps
    examples = Examples(
        run.pairs.train,
        augmentation(run.model.base, recipe),
        recipe.seed,
        refuse=recipe.on_broken == "refuse",
    )
    source = _endless(examples, run.schedule.part, run.position, run.accelerator, recipe.workers)
    while run.step < steps:
        started = time.perf_counter()
        rate = run.schedule.learning_rate(run.step)
        loss = _step(run, source, rate, progress)
        progress.step(run.step, loss, rate, time.perf_counter() - started)
        if not math.isfinite(loss):
            raise RAdapterError(
                f"the loss is {loss} at step {run.step}; lower --learning-rate or --precision no"
            )
        stop = interruption.asked(run.accelerator)
        due = recipe.save_every and (run.step % recipe.save_every == 0 or run.step == steps)
        if stop or due:
            run.save()
        if stop:
            progress.say(
                f"saved a checkpoint after step {run.step}; continue with radapter-train --resume"
                f" {run.out}"
            )
            interruption.end()
        if recipe.validate_every and run.step % recipe.validate_every == 0 and run.step < steps:
            _validate(run, progress)


def _step(run: _Run, source: Source, rate: float, progress: Progress) -> float:
    """One optimizer step over all parts of its batch; returns the mean loss."""
    recipe = run.recipe
    accelerator = run.accelerator
    optimizer = run.learner.optimizer
    adapters = run.model.adapters
    for group in optimizer.param_groups:
        group["lr"] = rate
    # Seeds all that a step draws, so that a resumed run draws the same.
    torch.manual_seed(recipe.seed * 1_000_003 + run.step)
    adapters.drop = run.parts.drop(recipe, run.step, run.schedule.steps)
    adapters.sample_drop()
    loss_sum = 0.0
    for _ in range(recipe.accumulate):
        run.position, batch = next(source)
        with accelerator.accumulate(run.model.towers):
            loss = _loss(run, batch)
            accelerator.backward(loss * accelerator.num_processes)  # see gather_with_grad
            if recipe.grad_clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(adapters.parameters(), recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.item()
        progress.broken(batch["broken"])
    run.learner.average.update()
    run.step += 1
    return loss_sum / recipe.accumulate


def _loss(run: _Run, batch: dict[str, Any]) -> Tensor:
    """The loss of one part over the pairs of all processes."""
    device = run.accelerator.device
    # Processes may have images of more labels than others.
    own = run.accelerator.pad_across_processes(
        batch["of_images"].to(device), dim=1, pad_index=NO_LABEL
    )
    of_images = run.accelerator.gather(own)
    others: dict[int, str] = {}
    if run.recipe.negative_classes:
        data = run.pairs.train
        assert not isinstance(data, Captioned)  # the recipe refuses it
        draw = random.Random(f"{run.recipe.seed}-{run.step}")
        present = of_images.unique().tolist()
        others = other_prompts(data, present, run.recipe.negative_classes, draw)
    mine = share([*others.values()], run.accelerator.process_index, run.accelerator.num_processes)
    tokens = run.model.base.tokenizer([*batch["texts"], *mine]).to(device)
    pixels = batch["pixels"].to(device, non_blocking=True)
    images, texts = run.model.towers(pixels, tokens)
    texts, negatives = texts.split([len(batch["texts"]), len(mine)])
    # each image stands beside each of its texts: but for a constant that is the loss of one image
    # with several texts, because all images come equally often
    several = len(texts) // len(images)
    of_images = of_images.repeat_interleave(several, dim=0)
    positive = torch.eye(len(of_images), dtype=torch.bool, device=device)
    if run.recipe.positives == "several":
        positive = positives_of(of_images, of_images[:, 0])
    images = gather_with_grad(images)
    texts = gather_with_grad(texts)
    if others:
        texts = torch.cat([texts, gather_with_grad(negatives)[: len(others)]])
        positive = F.pad(positive, (0, len(others)))
    contrast: Callable[..., Tensor] = mpm_nce
    if run.model.bias is not None:
        contrast = partial(pairwise_sigmoid, logit_bias=run.model.bias)
    if run.parts.class_offsets is not None:
        assert run.model.bias is None  # no ablation offsets sigmoids
        offsets = run.parts.class_offsets(run.pairs.train)
        of_texts = [*of_images[:, 0].tolist(), *others]
        contrast = partial(contrast, text_offsets=offsets[of_texts].to(device))
    loss = contrast(
        images.repeat_interleave(several, dim=0),
        texts,
        positive,
        logit_scale=run.model.scale,
        delta=run.recipe.delta,
        epsilon=run.recipe.epsilon,
    )
    if run.recipe.preserve:
        model = run.model
        distance = run.parts.distance(model.base, model.adapters, run.accelerator, pixels, images)
        loss = loss + run.recipe.preserve * distance
    return loss


def _validate(run: _Run, progress: Progress) -> dict[str, float]:
    """Measure the average as it is now; nothing without validation data."""
    model = run.model
    if run.pairs.val is None:
        return {}
    with run.learner.average.applied():
        metrics = run.parts.validate(
            model.base, model.adapters, run.pairs.val, run.recipe, run.accelerator
        )
    progress.metrics(run.step, metrics)
    return metrics


def _write_adapter(run: _Run, metrics: dict[str, float], progress: Progress) -> None:
    """Write the average as the run's adapter, from the main process."""
    if not run.accelerator.is_main_process:
        return
    recipe = run.recipe
    data = run.pairs.train
    base = run.model.base
    path = run.out / ADAPTER
    run.model.adapters.load_tensors(run.learner.average.tensors)
    metadata = Metadata(
        architecture=base.name,
        pretrained=base.pretrained,
        base_digest=run.model.digest,
        rank=recipe.rank,
        task=recipe.task,
        alpha=recipe.alpha,
        templates=templates_of(recipe.templates),
        recipe=recipe.to_dict(),
        metrics=metrics,
        classes=None if isinstance(data, Captioned) else list(data.classes),
        held_out=run.pairs.held_out,
    )
    save_adapter(run.model.adapters.adapter(metadata), path)
    folder = shlex.quote(str(run.out))
    chosen = f"radapter-export --adapter {folder} --alpha {recipe.alpha}"
    following = (
        chosen if run.pairs.val is None else f"radapter-eval --adapter {folder} --alpha auto"
    )
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
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return (
        recipe.min_learning_rate
        + (recipe.peak_rate - recipe.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
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
        epoch += 1
        start = 0
