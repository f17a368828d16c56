"""The training loop, on accelerate: one process or many, CPU or GPU, any precision."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import shlex
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from radapter_serve.adapter import find_sites
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.contract.labels import split_label
from radapter_serve.data.rows import LabelledImages
from radapter_serve.errors import RAdapterError
from radapter_serve.sources import ADAPTER
from radapter_serve.training.batches import NO_LABEL, Position, endless
from radapter_serve.training.data import RunData
from radapter_serve.training.loss import (
    distance_to_base,
    divergence_from_base,
    gather_with_grad,
    pairwise_sigmoid,
    positives_of,
)
from radapter_serve.training.progress import Interruption, Progress
from radapter_serve.training.recipe import Recipe, Run
from radapter_serve.training.setup import (
    Learner,
    build,
    end_processes,
    load_checkpoint,
    save_checkpoint,
    start_tracker,
    write_adapter,
    write_recipe,
)
from radapter_serve.training.validation import validate

WORDS = 64  # drawn from the vocabulary for each step


def fit(recipe: Recipe, opened: RunData, out: Path, *, show: bool = True) -> Run:
    """Train with a recipe on its opened data, and write the average of the adapters."""
    learner = build(recipe, opened, out)
    accelerator = learner.accelerator
    plan = learner.plan
    recipe = learner.recipe
    step, position = load_checkpoint(out, learner) if recipe.resume else (0, (0, 0))

    # Start the tracker: if it does not start, nothing has been written. Then make the run's folder,
    # with its recipe.
    start_tracker(accelerator, recipe)
    if accelerator.is_main_process:
        write_recipe(recipe, out)
    progress = Progress(accelerator, plan, out, step, show=show)
    progress.broken.update(opened.broken)
    if show and step == 0:
        progress.to_embed = seconds_to_embed(learner)
    notes = [*opened.notes, *plan.notes]
    for line in (_summary(learner, out, step), *notes):
        progress.say(line)

    batches = endless(
        learner.examples,
        plan.part,
        position=position,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=recipe.workers,
    )
    quoted = shlex.quote(str(out))
    with progress.bar:
        with Interruption(progress.say) as interruption:
            while step < plan.steps:
                position = take_step(learner, batches, step, progress)
                step += 1

                # Save and validate when due, and stop after a signal.
                stop = interruption.asked(accelerator)
                due = recipe.save_every and (step % recipe.save_every == 0 or step == plan.steps)
                if stop or due:
                    save_checkpoint(out, learner, step, position)
                if stop:
                    resume = f"radapter-train --resume {quoted}"
                    progress.say(f"saved a checkpoint after step {step}; continue with {resume}")
                    interruption.end()
                every = recipe.validate_every
                if every and step % every == 0 and step < plan.steps:
                    progress.metrics(step, validate(learner))

        metrics = validate(learner)
        progress.metrics(step, metrics)
        notes += progress.end()
        if accelerator.is_main_process:
            write_adapter(learner, recipe, learner.average.tensors, metrics, out)
            following = f"radapter-eval --adapter {quoted} --alpha auto"
            if learner.val is None:
                following = f"radapter-export --adapter {quoted} --alpha {recipe.alpha}"
            progress.say(f"wrote {out / ADAPTER}; next: {following}")
    end_processes(accelerator)
    return Run(out, recipe, metrics, tuple(notes))


def take_step(
    learner: Learner,
    batches: Iterator[tuple[Position, dict[str, Any]]],
    step: int,
    progress: Progress,
) -> Position:
    """Take an optimizer step over all parts of its batch, and report it; returns the position that
    comes next.
    """
    recipe = learner.recipe
    accelerator = learner.accelerator
    optimizer = learner.optimizer
    started = time.perf_counter()
    rate = learner.plan.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    # Seed the random draws of a step, so that a resumed run draws the same.
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    learner.adapters.sample_drop()
    loss_sum = 0.0
    for _ in range(recipe.accumulate):
        position, batch = next(batches)
        with accelerator.accumulate(learner.towers):
            loss = batch_loss(learner, batch, step)
            accelerator.backward(loss * accelerator.num_processes)  # gather_with_grad
            if recipe.grad_clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(learner.adapters.parameters(), recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.item()
        progress.broken.update(batch["broken"])
    learner.average.update()

    mean_loss = loss_sum / recipe.accumulate
    progress.step(step + 1, mean_loss, rate, time.perf_counter() - started)
    if not math.isfinite(mean_loss):
        raise RAdapterError(
            f"the loss is {mean_loss} at step {step + 1}; lower --learning-rate or --precision no"
        )
    return position


@torch.no_grad()
def seconds_to_embed(learner: Learner) -> float | None:
    """Time to embed each image of a run once, which is most of what an adapter on a projection
    takes, from a batch of black images; None if this run could not have one.
    """
    model = learner.base.model
    accelerator = learner.accelerator
    if accelerator.num_processes > 1 or learner.plan.recipe.task == "segmentation":
        return None
    with contextlib.suppress(RAdapterError):
        find_sites(model, adapt="text-projection")
        side = learner.base.image_size
        pixels = torch.zeros(learner.plan.part, 3, side, side, device=accelerator.device)
        times = []
        with accelerator.autocast(), parametrize.cached():
            for _ in range(2):  # the first one also warms up
                began = time.perf_counter()
                encode_image(model, pixels).cpu()
                times.append(time.perf_counter() - began)
        return min(times) / len(pixels) * len(learner.examples.data.image_rows)
    return None


def batch_loss(learner: Learner, batch: dict[str, Any], step: int) -> Tensor:
    """The loss of a part of a batch, over the pairs of all processes."""
    recipe = learner.recipe
    accelerator = learner.accelerator
    device = accelerator.device

    # Draw prompts of classes that no image of any process has. Pad the labels first, as the images
    # of one process may have more labels than those of another.
    labels = batch["of_images"].to(device)
    labels = accelerator.pad_across_processes(labels, dim=1, pad_index=NO_LABEL)
    labels = accelerator.gather(labels)
    data = learner.examples.data
    others: dict[int, str] = {}
    if recipe.negative_classes:
        assert isinstance(data, LabelledImages)  # Recipe.check refuses other data
        draw = random.Random(f"{recipe.seed}-{step}")
        present = labels.unique().tolist()
        others = other_prompts(data, present, recipe.negative_classes, draw)

    # Draw words for which the base's answers should be kept.
    base = learner.base
    words: list[str] = []
    if recipe.preserve_words:
        known = vocabulary(tuple(data.classes) if isinstance(data, LabelledImages) else ())
        words = [known[place] for place in torch.randperm(len(known))[:WORDS].tolist()]

    # Embed the images and texts, a share of the prompts, and the words; gather all but the words.
    prompts = share([*others.values()], accelerator.process_index, accelerator.num_processes)
    tokens = base.tokenizer([*batch["texts"], *prompts, *words]).to(device)
    pixels = batch["pixels"].to(device, non_blocking=True)
    images, texts = learner.towers(pixels, tokens)
    texts, negatives, own_words = texts.split([len(batch["texts"]), len(prompts), len(words)])
    images = gather_with_grad(images)
    texts = gather_with_grad(texts)

    # Repeat each image for each of its texts. All images are repeated equally often, so up to a
    # constant this is the loss of images with several texts.
    several = recipe.captions_per_image
    labels = labels.repeat_interleave(several, dim=0)
    positive = torch.eye(len(labels), dtype=torch.bool, device=device)
    if recipe.positives == "several":
        positive = positives_of(labels, labels[:, 0])
    if others:
        texts = torch.cat([texts, gather_with_grad(negatives)[: len(others)]])
        positive = F.pad(positive, (0, len(others)))

    loss = learner.loss_fn(images.repeat_interleave(several, dim=0), texts, positive)
    if recipe.preserve or recipe.preserve_words:
        tokens = tokens[len(tokens) - len(words) :]
        loss = add_change(loss, learner, pixels, images, tokens, own_words)
    return loss


def add_change(
    loss: Tensor, learner: Learner, pixels: Tensor, images: Tensor, tokens: Tensor, words: Tensor
) -> Tensor:
    """Add to the loss how far images, and their probabilities of words, are from the base's."""
    # The model in training becomes its base for a moment, without a second model in memory, and
    # with a separate cache: the weights in the training's cache include the adapters.
    model = learner.base.model
    learner.adapters.alpha = 0.0
    with torch.no_grad(), learner.accelerator.autocast(), parametrize.cached():
        base_images = learner.accelerator.gather(encode_image(model, pixels))
        base_words = encode_text(model, tokens) if len(tokens) else None
    learner.adapters.alpha = 1.0
    loss = loss + learner.recipe.preserve * distance_to_base(images, base_images)
    if base_words is not None:
        scale = learner.loss_fn.keywords["logit_scale"]
        divergence = divergence_from_base(images, words, base_images, base_words, scale)
        loss = loss + learner.recipe.preserve_words * divergence
    return loss


def _summary(learner: Learner, out: Path, step: int) -> str:
    """One line about the run that starts."""
    plan = learner.plan
    recipe = plan.recipe
    if step >= plan.steps:
        return (
            f"{out} was finished already, after step {step} of {plan.steps}; this trains nothing,"
            " and only validates and writes its adapter again"
        )
    rank = "full rank" if recipe.rank is None else f"rank {recipe.rank}"
    processes = learner.accelerator.num_processes
    sigmoid = learner.loss_fn.func is pairwise_sigmoid
    return (
        f"{learner.adapters.summary(learner.base.model)}, {rank}, in {learner.adapters.form} form;"
        f" {plan.steps} steps of {recipe.batch_size} images"
        + ("" if recipe.precision == "no" else f" in {recipe.precision}")
        + (f" in {processes} processes" if processes > 1 else "")
        + ("; pairwise sigmoid loss, as the base is scored" if sigmoid else "")
    )


def other_prompts(
    data: LabelledImages, present: Collection[int], count: int, draw: random.Random
) -> dict[int, str]:
    """Draw prompts of at most `count` classes that no image of a batch has, by class number."""
    names = [split_label(line)[0] for line in data.classes]
    # The prompt of a class with the same first name as one in the batch would be right.
    taken = {names[label] for label in present if 0 <= label < len(names)}
    absent = [label for label, name in enumerate(names) if name not in taken]
    drawn = draw.sample(absent, min(count, len(absent)))
    return {label: data.prompt(label, draw) for label in drawn}


def share(texts: Sequence[str], process: int, processes: int) -> list[str]:
    """One process's part of texts; the first text pads the last parts, so that all are as long."""
    size = math.ceil(len(texts) / processes)
    missing = size * processes - len(texts)
    return [*texts, *(missing * list(texts[:1]))][size * process : size * (process + 1)]


@functools.cache
def vocabulary(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of ImageNet's classes in open_clip, without the names that contain a class."""
    names = {name.casefold() for label in classes for name in split_label(label)}
    return tuple(
        word
        for word in dict.fromkeys(open_clip.IMAGENET_CLASSNAMES)
        if not any(f" {name} " in f" {word.casefold()} " for name in names)
    )
