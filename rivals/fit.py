"""The one loop that every rival is trained by."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.optim import Optimizer

from radapter_serve.errors import RAdapterError
from radapter_serve.training.batches import Examples, batches
from radapter_serve.training.loop import learning_rate
from radapter_serve.training.setup import augmentation
from rivals.run import Run
from rivals.system import Batch, Cost, Learned, System


class Meter:
    """Seconds from its making on, and bytes at most: of the GPU where there is one, else of this
    process.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def cost(self, parameters: int) -> Cost:
        """The cost so far of learning so many parameters."""
        gpu = self.device.type == "cuda"
        memory = (
            torch.cuda.max_memory_allocated()
            if gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return Cost(parameters, time.perf_counter() - self._started, memory)


def fit(system: System, optimizer: Optimizer, run: Run) -> Learned:
    """Train what learns of a system.

    Args:
        system: where it starts; it is changed.
        optimizer: of its learning parameters; a group's rate is the schedule's, times `share` where
            the group has one.
        run: the recipe says how long, how fast, and what the images look like.

    Raises:
        RAdapterError: there are fewer images than a batch takes, an image can't be read, or the
            loss is not finite.
    """
    recipe = run.recipe
    count = len(run.data.rows)
    if count < recipe.batch_size:
        raise RAdapterError(
            f"batch_size is {recipe.batch_size} but the data holds {count} images; lower it"
        )
    steps = recipe.length(count)
    schedule = recipe.of_length(steps)
    meter = Meter()
    device = meter.device
    source = _batches(run, meter.device)
    system.to(device).eval()  # CLIP's towers drop nothing
    learning = system.learning()
    for step in track(range(steps), "learning", console=Console(stderr=True), transient=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, steps) * group.get("share", 1.0)
        for _ in range(recipe.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = system(next(source)) / recipe.accumulate
            loss.backward()
            if not math.isfinite(loss.item()):
                raise RAdapterError(
                    f"the loss is {loss.item()} at step {step}; lower the learning rate"
                )
        if recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        system.after_step(step + 1, steps)
    return Learned(system, meter.cost(sum(parameter.numel() for parameter in learning)))


def _batches(run: Run, device: torch.device) -> Iterator[Batch]:
    """The parts of all epochs, without an end."""
    recipe = run.recipe
    epoch = 0
    examples = Examples(
        run.data, augmentation(run.base, recipe), recipe.seed, refuse=recipe.on_broken == "refuse"
    )
    part = recipe.batch_size // recipe.accumulate
    while True:
        loader = batches(
            examples, part, epoch=epoch, start=0, rank=0, world=1, workers=recipe.workers
        )
        for batch in loader:
            if "error" in batch:
                raise RAdapterError(batch["error"])
            yield _on(batch, device)
        epoch += 1


def _on(batch: dict[str, Any], device: torch.device) -> Batch:
    return {
        **batch,
        **{name: batch[name].to(device, non_blocking=True) for name in ("pixels", "labels")},
    }
