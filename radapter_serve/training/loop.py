"""The training loop, on accelerate: one process or many, CPU or GPU, any precision."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision import transforms

from radapter_serve.adapter import Adapters, Form, Metadata, attach, base_digest, find_sites, save_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.prompts import templates_of
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.data import TrainingData
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.training.average import Average
from radapter_serve.training.batches import Examples, Transform, batches
from radapter_serve.training.checkpoint import NAME as CHECKPOINT
from radapter_serve.training.checkpoint import load_checkpoint, save_checkpoint
from radapter_serve.training.loss import gather_with_grad, mpm_nce
from radapter_serve.training.progress import Progress
from radapter_serve.training.recipe import Recipe
from radapter_serve.training.tasks import open_data
from radapter_serve.training.validation import validate


class TwoTower(nn.Module):
    """Both towers behind one forward, which is what data parallelism wraps."""

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.model, self.adapters = model, adapters

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds pixels [B, 3, S, S] and tokens [B, L], both to float32 [B, D] of unit length."""
        with parametrize.cached():  # attention reads its weights more than once
            return encode_image(self.model, pixels), encode_text(self.model, tokens)


def train(recipe: Recipe) -> Path:
    """Train adapters as a recipe says.

    Args:
        recipe: see `Recipe`.

    Returns:
        The run's folder: `adapter.safetensors`, `recipe.yaml`, `metrics.jsonl`, `checkpoint.pt`, the tracker's files.

    Raises:
        RAdapterError: the recipe, the model or the data won't do; nothing was written then.
    """
    recipe.check()
    out = _run_folder(recipe)
    accelerator = _accelerator(recipe, out)
    torch.manual_seed(recipe.seed)
    base = load_base(recipe.architecture, recipe.pretrained)
    broken: list[str] = []
    data = open_data(recipe, base, broken=broken)
    val = open_data(recipe, base, validation=True, broken=broken) if recipe.val_data else None
    examples = Examples(data, augmentation(base, recipe), recipe.seed, refuse=recipe.on_broken == "refuse")
    part = _part(recipe, accelerator, data)
    where = {"text": recipe.adapt_text, "partial": recipe.partial}
    digest = base_digest(base.model.state_dict(), [site.key for site in find_sites(base.model, **where)])
    form = choose_form(base.model, recipe.rank, part, **where) if recipe.form == "auto" else recipe.form
    adapters = attach(base.model, recipe.rank, form=form, drop=recipe.drop, **where)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    towers, optimizer = accelerator.prepare(TwoTower(base.model, adapters), optimizer)
    average = Average(adapters, recipe.momentum, bias_correction=recipe.bias_correction)
    steps = recipe.steps or recipe.epochs * (len(data.rows) // recipe.batch_size)
    if recipe.warmup_steps >= steps:
        raise RAdapterError(f"warmup_steps is {recipe.warmup_steps} but the run has {steps} steps; lower it")
    step, position = 0, (0, 0)
    if recipe.resume:
        step, position = load_checkpoint(out, recipe, adapters, average, optimizer, accelerator)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
    _start_tracker(accelerator, recipe)
    scale = float(base.model.state_dict()["logit_scale"].exp())
    metrics: dict[str, float] = {}

    with Progress(accelerator, out, steps, recipe.batch_size, done=step) as progress:
        progress.say(
            f"{adapters.share(base.model)}, {'full rank' if recipe.rank is None else f'rank {recipe.rank}'}, "
            f"in {form} form; {steps} steps of {recipe.batch_size} images"
            + (f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else "")
        )
        progress.broken(broken)
        source = _endless(examples, part, position, accelerator, recipe.workers)
        while step < steps:
            started = time.perf_counter()
            rate = learning_rate(recipe, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            adapters.sample_drop(torch.Generator().manual_seed(recipe.seed * 1_000_003 + step))
            loss_sum = 0.0
            for _ in range(recipe.accumulate):
                position, batch = next(source)
                with accelerator.accumulate(towers):
                    tokens = base.tokenizer(batch["texts"]).to(accelerator.device)
                    images, texts = towers(batch["pixels"].to(accelerator.device, non_blocking=True), tokens)
                    labels = accelerator.gather(batch["labels"].to(accelerator.device))
                    # each image stands beside each of its texts: but for a constant that is the loss of one image
                    # with several texts, because all images come equally often
                    several = len(texts) // len(images)
                    loss = mpm_nce(
                        gather_with_grad(images).repeat_interleave(several, dim=0),
                        gather_with_grad(texts),
                        labels.repeat_interleave(several),
                        logit_scale=scale,
                        delta=recipe.delta,
                        epsilon=recipe.epsilon,
                    )
                    accelerator.backward(loss * accelerator.num_processes)  # see gather_with_grad
                    if recipe.grad_clip is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(adapters.parameters(), recipe.grad_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                loss_sum += loss.item()
                progress.broken(batch["broken"])
            average.update()
            step += 1
            progress.step(step, loss_sum / recipe.accumulate, rate, time.perf_counter() - started)
            if not math.isfinite(loss_sum):
                raise RAdapterError(f"the loss is {loss_sum} at step {step}; lower --learning-rate or --precision no")
            if recipe.save_every and (step % recipe.save_every == 0 or step == steps):
                save_checkpoint(out, recipe, adapters, average, optimizer, accelerator, step, position)
            if val and recipe.validate_every and step % recipe.validate_every == 0 and step < steps:
                with average.applied():
                    progress.metrics(step, validate(base, adapters, val, recipe, accelerator))
        if val:
            with average.applied():
                metrics = validate(base, adapters, val, recipe, accelerator)
            progress.metrics(steps, metrics)
        progress.end()
        if accelerator.is_main_process:
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
                metrics=metrics,
            )
            save_adapter(adapters.adapter(metadata), out / "adapter.safetensors")
            progress.say(
                f"wrote {out / 'adapter.safetensors'}; next: radapter-export --adapter {out} --alpha {recipe.alpha}"
            )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to the least rate."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return (
        recipe.min_learning_rate
        + (recipe.learning_rate - recipe.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
    )


def choose_form(
    model: nn.Module, rank: int | None, batch_size: int, *, text: bool = True, partial: bool = False
) -> Form:
    """The form of the adapters that costs less for a batch, by its multiplications.

    The activation form pays by the token; the weight form pays for `F·W` once a step, and for the gradient of the
    weight that the adapter changes, which the activation form never needs.

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
        count, width, inner = tokens[site.key.startswith("visual.")], site.layer.out_features, site.layer.in_features
        weight += 4 * width * (width if rank is None else 2 * rank) * inner + 2 * count * width * inner
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


def _endless(
    examples: Examples, part: int, position: tuple[int, int], accelerator: Accelerator, workers: int
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Batches for ever, each with the (epoch, batch or row) that comes after it."""
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
            yield (epoch, batch["row"] or offset), batch  # a stream goes on behind its last row
        if offset == start == 0:
            raise RAdapterError(f"the data set has fewer images that can be read than a batch of {part}")
        epoch, start = epoch + 1, 0


def _part(recipe: Recipe, accelerator: Accelerator, data: TrainingData) -> int:
    """Images a process and accumulated part."""
    cut: int = recipe.accumulate * accelerator.num_processes
    if recipe.batch_size % cut or recipe.batch_size // cut < 1:
        raise RAdapterError(f"batch_size {recipe.batch_size} can't be cut into {cut} parts (processes × accumulate)")
    if not recipe.streaming and len(data.rows) < recipe.batch_size:
        raise RAdapterError(f"batch_size is {recipe.batch_size} but the data holds {len(data.rows)} images; lower it")
    return recipe.batch_size // cut


def _run_folder(recipe: Recipe) -> Path:
    stem = recipe.architecture.removeprefix("local-dir:").rstrip("/").split("/")[-1]
    out = recipe.out or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    # what failed before there was a checkpoint has nothing to go on with, and nothing to lose
    if not recipe.resume and any((out / name).exists() for name in (CHECKPOINT, "adapter.safetensors")):
        raise RAdapterError(f"{out} holds a run; go on with it by --resume, or name another folder by --out")
    return out


def _accelerator(recipe: Recipe, out: Path) -> Accelerator:
    precision = recipe.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise RAdapterError("precision fp16 needs a GPU; allowed on this machine: no, bf16")
    AcceleratorState._reset_state()  # else a second run in this process could not have another precision
    try:
        return Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know of each other
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.accumulate,
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            project_dir=out,
        )
    except ValueError as error:
        raise RAdapterError(f"tracker {recipe.tracker!r} can't be used: {reason(error)}") from error


def _start_tracker(accelerator: Accelerator, recipe: Recipe) -> None:
    if recipe.tracker == "none":
        return
    if not accelerator.log_with:  # accelerate only warns
        raise RAdapterError(f"tracker {recipe.tracker} is not installed: pip install {recipe.tracker}")
    try:
        accelerator.init_trackers("radapter", config={k: str(v) for k, v in recipe.to_dict().items()})
    except Exception as error:  # each tracker raises its own kinds: not logged in, offline
        raise RAdapterError(f"tracker {recipe.tracker} does not start: {reason(error)}") from error
