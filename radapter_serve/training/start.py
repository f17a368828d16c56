"""Training from a recipe: the data is checked before torch is loaded and a model is fetched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from radapter_serve.errors import RAdapterError
from radapter_serve.training.recipe import CHECKPOINT, Recipe
from radapter_serve.training.tasks import open_run

if TYPE_CHECKING:
    from radapter_serve.training.parts import Parts


def train(recipe: Recipe, parts: Parts | None = None) -> Path:
    """Train adapters as a recipe says.

    Args:
        recipe: see `Recipe`.
        parts: what an ablation exchanges; None for the method's own.

    Returns:
        The run's folder: `adapter.safetensors`, `recipe.yaml`, `metrics.jsonl`, `checkpoint.pt`,
        the tracker's files.

    Raises:
        RAdapterError: the recipe, the model or the data won't do; nothing was written then.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        SystemExit: after SIGTERM, once a checkpoint is written.
    """
    recipe.check()
    out = run_folder(recipe)
    opened = open_run(recipe)
    from radapter_serve.training.loop import train_on
    from radapter_serve.training.parts import OWN

    return train_on(recipe, opened, out, parts or OWN)


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run; refuses one that holds another run."""
    stem = recipe.architecture.rpartition(":")[2].rstrip("/").split("/")[-1]
    out = recipe.out or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    # what failed before there was a checkpoint has nothing to go on with, and nothing to lose
    if not recipe.resume and any(
        (out / name).exists() for name in (CHECKPOINT, "adapter.safetensors")
    ):
        raise RAdapterError(
            f"{out} holds a run; go on with it by --resume {out}, or name another folder by --out"
        )
    return out
