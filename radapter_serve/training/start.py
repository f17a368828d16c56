"""`train`: checks the data before torch is loaded and a model is fetched, and searches the learning
rate if the recipe has `auto`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.labels import split_label
from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.files import write_text
from radapter_serve.process import limit_threads
from radapter_serve.sources import ADAPTER, CHECKPOINT, RATES, check_weights
from radapter_serve.training.recipe import Recipe, Run, recipe_from

if TYPE_CHECKING:
    from radapter_serve.training.data import RunData
    from radapter_serve.training.setup import Learner

GRID = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
PAPER = 5e-4
START = GRID[3:6]  # around the paper's rate
KEPT = 0.9  # a rate keeps at least this part of the base's answers that the paper's rate keeps
SHARE = 4  # a short run has a fourth of the run's steps, so that four short runs have as many


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
        RAdapterError: the recipe, the model or the data is invalid; then nothing was written,
            except the table of a search for the learning rate.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; a search for the learning
            rate writes no checkpoint.
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
    if chosen.learning_rate == "auto" and chosen.resume:  # the stopped run has found the rate
        earlier = recipe_from(resume=out)
        chosen = dataclasses.replace(
            chosen,
            learning_rate=earlier.learning_rate,
            min_learning_rate=earlier.min_learning_rate,
        )
    opened = open_run(chosen, images=not chosen.has_embeddings, progress=progress)
    if chosen.of_projections:
        from radapter_serve.training.projection import fit_projection

        return fit_projection(chosen, opened, out, show=progress)
    from radapter_serve.training.loop import fit

    if chosen.learning_rate == "auto":
        say = print if progress else lambda line: None
        chosen, notes = search_rate(chosen, opened, out, say)
        opened = dataclasses.replace(opened, notes=(*opened.notes, *notes))
    return fit(chosen, opened, out, show=progress)


@dataclass(frozen=True)
class ShortRun:
    """A short run: its peak rate, whether each held-out image is right at the recipe's α, bool [N],
    and the fraction of the base's answers among common nouns that it keeps.
    """

    learning_rate: float
    right: NDArray[np.bool_]
    kept: float

    @property
    def accuracy(self) -> float:
        """The fraction of images that are right."""
        return float(self.right.mean())

    @property
    def worth(self) -> tuple[float, int, float]:
        """Orders runs by accuracy, then by nearness to the paper's rate, then to the lower rate."""
        away = abs(GRID.index(self.learning_rate) - GRID.index(PAPER))
        return round(self.accuracy, 9), -away, -self.learning_rate


def search_rate(
    recipe: Recipe, opened: RunData, out: Path, say: Callable[[str], None]
) -> tuple[Recipe, list[str]]:
    """Choose the learning rate, and write `rates.json` into the run's folder; returns the recipe
    with the rate, and notes for the user.
    """
    from radapter_serve.data.rows import LabelledImages
    from radapter_serve.evaluation.image_sets import common_nouns
    from radapter_serve.training.loop import fit
    from radapter_serve.training.validation import answers

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RAdapterError(
            "learning_rate auto searches in one process; start radapter-train without a launcher,"
            " stop it once it has printed the rate, and start several processes with"
            " --learning-rate RATE"
        )
    # Let warm-up and average follow the length of a short run.
    short = dataclasses.replace(
        recipe,
        steps=max(1, recipe.resolved(len(opened.data.rows)).steps // SHARE),
        warmup_steps=None,
        momentum=None,
        validate_every=None,
        save_every=None,
        tracker="none",
    )
    assert isinstance(opened.data, LabelledImages)  # `Recipe.check` refuses auto for others
    nouns = common_nouns([name for line in opened.data.classes for name in split_label(line)])
    of_base: list[NDArray[np.int64]] = []  # answers of the base, from the first short run
    tried: list[ShortRun] = []

    def short_run(rate: float) -> None:
        began = time.monotonic()

        def measure(learner: Learner) -> dict[str, float]:
            alphas = [recipe.alpha] if of_base else [0.0, recipe.alpha]
            right, named = answers(learner, alphas, nouns)
            if not of_base:
                of_base.append(named[0])
            tried.append(ShortRun(rate, right[-1], float((named[-1] == of_base[0]).mean())))
            return {}

        least = min(recipe.min_learning_rate, rate)
        at_rate = dataclasses.replace(short, learning_rate=rate, min_learning_rate=least)
        with tempfile.TemporaryDirectory() as folder:
            fit(at_rate, opened, Path(folder), show=False, measure=measure)
        run = tried[-1]
        kept = f", {100 * run.kept:.1f} % of the base's answers among other nouns kept"
        say(
            f"learning rate {rate:.2g}: {100 * run.accuracy:.1f} % of {len(run.right)} held-out"
            f" images right at alpha {recipe.alpha:g}{kept if nouns else ''}"
            f" ({time.monotonic() - began:.0f} s)"
        )

    # Try the rates around the paper's, and one more if the best rate is at an edge.
    most = len(START) + 1
    say(
        f"choosing the learning rate with {len(START)} or {most} short runs, with"
        f" {len(START) / SHARE:.2g} to {most / SHARE:.2g} times the steps of the run itself"
    )
    for rate in START:
        short_run(rate)
    beyond = next_rate(tried)
    if beyond is not None:
        short_run(beyond)
    chosen = most_conservative(tried).learning_rate
    best = _best(tried).learning_rate
    tried.sort(key=lambda run: run.learning_rate)
    notes = []
    if best in (tried[0].learning_rate, tried[-1].learning_rate):
        notes.append(
            f"warning: the best learning rate, {best:.2g}, is at the edge of what was tried; see"
            " whether the loss falls, or give a rate with --learning-rate"
        )

    # Write the table.
    table = {
        "chosen": chosen,
        "rule": f"rates that keep less than {KEPT:g} of the base's answers among common nouns that"
        " 5e-4 keeps are left out; of those within one standard error of the best on held-out"
        " images, the one that keeps most, and none below 5e-4 if the best is not",
        "tried": [
            {
                "learning_rate": run.learning_rate,
                "accuracy": round(100 * run.accuracy, 2),
                "base_answers_kept": round(100 * run.kept, 2) if nouns else None,
                "images": len(run.right),
            }
            for run in tried
        ],
        "notes": notes,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RATES, json.dumps(table, indent=2))
    say(f"chose learning rate {chosen:.2g}; {out / RATES} has the table")
    least = min(recipe.min_learning_rate, chosen)
    return dataclasses.replace(recipe, learning_rate=chosen, min_learning_rate=least), notes


def next_rate(tried: Sequence[ShortRun]) -> float | None:
    """The next rate of the grid if the best of the tried rates is at their edge, else None."""
    best = _best(tried).learning_rate
    place = GRID.index(best)
    rates = [run.learning_rate for run in tried]
    if best == max(rates) and best < GRID[-1]:
        return GRID[place + 1]
    if best == min(rates) and best > GRID[0]:
        return GRID[place - 1]
    return None


def most_conservative(tried: Sequence[ShortRun]) -> ShortRun:
    """The run that keeps most of the base's answers, of those within one standard error of the
    best: that of the paired difference over the held-out images (the one-standard-error rule of
    Breiman et al., Classification and Regression Trees, 1984). Its rate is not lower than both
    the best and the paper's, as over few images a rate that learns nothing can look as good.
    """
    best = _best(tried)
    equals = []
    for run in tried:
        if run.learning_rate < min(best.learning_rate, PAPER):
            continue
        differences = best.right.astype(np.float64) - run.right.astype(np.float64)
        error = float(np.std(differences) / len(differences) ** 0.5)
        if best.accuracy - run.accuracy <= error:
            equals.append(run)
    return max(equals, key=lambda run: (run.kept, run.worth))


def _best(tried: Sequence[ShortRun]) -> ShortRun:
    """The run with the most worth that keeps `KEPT` of what the paper's rate keeps."""
    of_paper = max((run.kept for run in tried if run.learning_rate == PAPER), default=0.0)
    return max((run for run in tried if run.kept >= KEPT * of_paper), key=lambda run: run.worth)
