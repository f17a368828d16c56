"""Checkpoints from which a killed run goes on to the same result: adapters, average, optimizer, place in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from radapter_serve.adapter import Adapters
from radapter_serve.errors import RAdapterError
from radapter_serve.training.average import Average
from radapter_serve.training.recipe import Recipe

NAME = "checkpoint.pt"
FREE = {"resume", "out", "workers", "tracker", "save_every", "validate_every", "val_data", "form", "on_broken"}


def save_checkpoint(
    out: Path,
    recipe: Recipe,
    adapters: Adapters,
    average: Average,
    optimizer: Optimizer,
    accelerator: Accelerator,
    step: int,
    position: tuple[int, int],
) -> None:
    """Write the state behind `step`, from the main process, whole or not at all."""
    if not accelerator.is_main_process:
        return
    state = {
        "recipe": {k: v for k, v in recipe.to_dict().items() if k not in FREE},
        "adapters": {name: value.detach().cpu() for name, value in adapters.named_tensors().items()},
        "average": {name: value.cpu() for name, value in average.tensors.items()},
        "average_steps": average.steps,
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "step": step,
        "position": position,
    }
    part = out / f".{NAME}.part"
    try:
        torch.save(state, part)
        part.replace(out / NAME)
    except (OSError, RuntimeError) as error:
        raise RAdapterError(f"could not write {out / NAME}: {error}; the last whole checkpoint is kept") from error
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(
    out: Path, recipe: Recipe, adapters: Adapters, average: Average, optimizer: Optimizer, accelerator: Accelerator
) -> tuple[int, tuple[int, int]]:
    """Set everything as it was behind the saved step.

    Returns:
        The step, and the (epoch, batch) that comes next.

    Raises:
        RAdapterError: there is none, or it belongs to another recipe.
    """
    path = out / NAME
    if not path.is_file():
        raise RAdapterError(f"no checkpoint at {path}; leave --resume out to start a run")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    now = recipe.to_dict()
    changed = [f"{k} was {v!r}, is {now[k]!r}" for k, v in state["recipe"].items() if now[k] != v]
    if changed:
        raise RAdapterError(
            f"{path} belongs to another recipe: {'; '.join(changed)}; use the old values or a new --out"
        )
    adapters.load_tensors(state["adapters"])
    average.load(state["average"], state["average_steps"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    epoch, batch = state["position"]
    return int(state["step"]), (int(epoch), int(batch))
