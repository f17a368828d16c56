"""Training from a recipe: the data is checked before torch is loaded and a model is fetched."""

from __future__ import annotations

import dataclasses
import sys
import time
from os import PathLike
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.process import limit_threads
from radapter_serve.sources import ADAPTER, CHECKPOINT
from radapter_serve.training.recipe import Recipe, Run, recipe_from
from radapter_serve.training.tasks import open_run


@one_line("train")
def train(
    recipe: str | Path | Recipe | None = None,
    *,
    resume: str | PathLike[str] | bool = False,
    progress: bool | None = None,
    **fields: Any,
) -> Run:
    """Train adapters, as `radapter-train` does.

    Args:
        recipe: name of a recipe that comes with the package, a YAML file, or a `Recipe`; None
            takes `small`, or for another task the recipe of its name.
        resume: folder of a stopped run to go on with, by its own recipe; True goes on with `out`.
        progress: show a bar, and what the command prints, or nothing; None shows them in a
            terminal and in a notebook.
        fields: any field of a `Recipe`, in place of the recipe's: `data`, `epochs`, `out`, ...;
            `base="NAME:TAG"` sets the model and its weights.

    Returns:
        The run, with its folder and its metrics.

    Raises:
        RAdapterError: the recipe, the model or the data won't do; nothing was written then, but for
            the table of a search for the learning rate.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; a search for the learning
            rate has none.
        SystemExit: after SIGTERM, likewise.
    """
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    chosen = recipe_from(recipe, resume, **fields)
    chosen.check()
    limit_threads(chosen.threads)  # before torch is loaded
    out = run_folder(chosen)
    if chosen.learning_rate == "auto" and chosen.resume:  # its run has found the rate
        earlier = recipe_from(resume=out)
        chosen = dataclasses.replace(
            chosen,
            learning_rate=earlier.learning_rate,
            min_learning_rate=earlier.min_learning_rate,
        )
    opened = open_run(chosen, progress=progress)
    from radapter_serve.training.loop import fit

    if chosen.learning_rate == "auto":
        from radapter_serve.training.rate import search_rate

        say = print if progress else lambda line: None
        chosen, notes = search_rate(chosen, opened, out, say)
        opened = dataclasses.replace(opened, notes=(*opened.notes, *notes))
    return fit(chosen, opened, out, show=progress)


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run; refuses one that holds another run."""
    stem = recipe.architecture.rpartition(":")[2].rstrip("/").split("/")[-1]
    out = recipe.out or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    # what failed before there was a checkpoint has nothing to go on with, and nothing to lose
    if not recipe.resume and any((out / name).exists() for name in (CHECKPOINT, ADAPTER)):
        raise RAdapterError(
            f"{out} holds a run; resume it by --resume {out}, or name another folder by --out"
        )
    return out
