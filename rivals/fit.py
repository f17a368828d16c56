"""The training loop of every rival."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.optim import Optimizer

from radapter_serve.errors import RAdapterError
from radapter_serve.training.batches import Examples, endless
from radapter_serve.training.setup import augmentation
from rivals.run import Run
from rivals.system import Cost, Learned, System


class Meter:
    """Measures seconds since its construction, and peak memory."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def cost(self, parameters: int) -> Cost:
        """Return the cost so far, with the number of parameters that learn."""
        gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if gpu else peak_memory()
        return Cost(parameters, time.perf_counter() - self._started, memory)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    `ru_maxrss` starts with the peak of the parent; VmHWM of Linux does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fit(system: System, optimizer: Optimizer, run: Run) -> Learned:
    """Train a system by the run's recipe; the rate of a group of the optimizer is the schedule's,
    times the group's `share` if it has one.
    """
    recipe = run.recipe
    count = len(run.data.rows)
    if count < recipe.batch_size:
        raise RAdapterError(
            f"batch_size is {recipe.batch_size} but the data holds {count} images; lower it"
        )
    plan = recipe.resolved(count)
    meter = Meter()
    device = meter.device
    examples = Examples(
        run.data, augmentation(run.base, recipe), recipe.seed, refuse=recipe.on_broken == "refuse"
    )
    source = endless(examples, plan.part, workers=recipe.workers)
    system.to(device).eval()  # CLIP's towers drop nothing
    learning = system.learning()
    for step in track(range(plan.steps), "learning", console=Console(stderr=True), transient=True):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step) * group.get("share", 1.0)
        for _ in range(recipe.accumulate):
            _, batch = next(source)
            for name in ("pixels", "labels"):
                batch[name] = batch[name].to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = system(batch) / recipe.accumulate
            loss.backward()
            if not math.isfinite(loss.item()):
                raise RAdapterError(
                    f"the loss is {loss.item()} at step {step}; lower the learning rate"
                )
        if recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        system.after_step(step + 1, plan.steps)
    return Learned(system, meter.cost(sum(parameter.numel() for parameter in learning)))
