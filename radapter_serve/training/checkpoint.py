"""Checkpoints from which a killed run goes on to the same result: adapters, average, optimizer,
place in the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import staged
from radapter_serve.sources import CHECKPOINT
from radapter_serve.training.recipe import Recipe
from radapter_serve.training.setup import Learner

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


def save_checkpoint(out: Path, learner: Learner, step: int, position: tuple[int, int]) -> None:
    """Save the state after a step from the main process, whole or not at all; every process calls
    it, each with the (epoch, batch or row) that comes next for it.
    """
    accelerator = learner.accelerator
    positions = gather_object([position])
    if not accelerator.is_main_process:
        return
    adapters = learner.adapters.named_tensors().items()
    state = {
        "recipe": _fixed(learner.plan.recipe),
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


def load_checkpoint(out: Path, learner: Learner) -> tuple[int, tuple[int, int]]:
    """Restore what was saved; gives the step, and the (epoch, batch or row) that comes next for
    this process. Refuses the checkpoint of another recipe, or of other held-out images.
    """
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
    recipe = learner.plan.recipe
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
    """What must be the same for a run to go on."""
    return {name: value for name, value in recipe.to_dict().items() if name not in FREE}
