"""`train`: checks the data before torch is loaded and a model is fetched."""

from __future__ import annotations

import shlex
import sys
import time
from os import PathLike
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.process import limit_threads
from radapter_serve.sources import ADAPTER, CHECKPOINT, check_weights
from radapter_serve.training.recipe import Recipe, Run, recipe_from


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
            takes `small`, or for another task the recipe of that name.
        resume: folder of a stopped run to continue, with its recipe; True continues `out`.
        progress: show a progress bar and the lines of the command; None shows them in a terminal
            and in a notebook.
        fields: any field of a `Recipe`, instead of the recipe's: `data`, `epochs`, `out`, ...;
            `base="NAME:TAG"` sets the model and its weights.

    Returns:
        The run, with its folder and its metrics.

    Raises:
        RAdapterError: the recipe, the model or the data is invalid; then nothing was written.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        SystemExit: after SIGTERM, likewise.
    """
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    chosen = recipe_from(recipe, resume, **fields)
    chosen.check()
    check_weights(chosen.architecture, chosen.pretrained)
    limit_threads(chosen.threads)  # before torch is loaded
    from radapter_serve.training.data import open_run  # takes seconds

    # Choose the folder, which must not hold another run. A run that failed before its first
    # checkpoint can't be resumed, and may be overwritten.
    stem = chosen.architecture.rpartition(":")[2].rstrip("/").split("/")[-1]
    out = chosen.out or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not chosen.resume and any((out / name).exists() for name in (CHECKPOINT, ADAPTER)):
        raise RAdapterError(
            f"{out} holds a run; resume it with --resume {shlex.quote(str(out))}, or name another"
            " folder with --out"
        )
    opened = open_run(chosen, progress=progress)
    if chosen.of_projections:
        from radapter_serve.training.projection import fit_projection

        return fit_projection(chosen, opened, out, show=progress)
    from radapter_serve.training.loop import fit

    return fit(chosen, opened, out, show=progress)
