"""`learning_rate: auto`: short runs over a grid that grows, of which held-out images choose one."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from radapter_serve.adapter import Adapters
from radapter_serve.clip.base import Base
from radapter_serve.data import Captioned, LabelledImages
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.runs import RATES
from radapter_serve.training.loop import fit
from radapter_serve.training.recipe import Recipe
from radapter_serve.training.tasks import RunData
from radapter_serve.training.validation import answers

GRID = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)
PAPER = 5e-4
START = GRID[3:6]  # around the paper's
SHARE = 4  # a short run has one of so many steps
WIDENINGS = 3  # with the start and a second seed, seven short runs: 1.75 times the cost of the run


@dataclass(frozen=True)
class Tried:
    """A short run.

    Attributes:
        learning_rate: its peak rate.
        right: which held-out images it classifies rightly at the recipe's α, bool [N].
        kept: share of the base's answers on them that it gives too, in [0, 1].
    """

    learning_rate: float
    right: NDArray[np.bool_]
    kept: float

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return float(self.right.mean())


@dataclass
class _Answers:
    """The validation of a short run, in place of that of a whole one; remembers what it found.

    Attributes:
        of_base: what the base answers, once it was asked, integer [N].
        right, kept: as of `Tried`, of the last run.
    """

    of_base: NDArray[np.int64] | None = None
    right: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    kept: float = 0.0

    def __call__(
        self,
        base: Base,
        adapters: Adapters,
        val: LabelledImages | Captioned,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> dict[str, float]:
        """As `validate`."""
        assert not isinstance(val, Captioned)
        alphas = [recipe.alpha] if self.of_base is not None else [0.0, recipe.alpha]
        answered, right = answers(base, adapters, val, alphas, recipe, accelerator)
        if self.of_base is None:
            self.of_base = answered[0]
        self.right = right[-1]
        self.kept = float((answered[-1] == self.of_base).mean())
        adapters.alpha = 1.0
        return {}


def search_rate(
    recipe: Recipe, opened: RunData, out: Path, say: Callable[[str], None]
) -> tuple[Recipe, list[str]]:
    """Choose the learning rate of a run, and write `rates.json` into its folder.

    Args:
        recipe: with `learning_rate: auto`.
        opened: its data, with validation images.
        out: folder of the run.
        say: takes a line for the user.

    Returns:
        The recipe with the rate as a number, and what its user should know, a line each.

    Raises:
        RAdapterError: several processes train, or a short run won't do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RAdapterError(
            "learning_rate auto searches in one process; start radapter-train by itself, stop it"
            " once it has printed the rate, and start several processes with --learning-rate RATE"
        )
    # Warm-up and average follow the length of a short run.
    steps = max(1, recipe.resolved(opened.images).steps // SHARE)
    collector = _Answers()

    def short_run(rate: float, seed: int) -> Tried:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            short = dataclasses.replace(
                recipe,
                learning_rate=rate,
                min_learning_rate=min(recipe.min_learning_rate, rate),
                steps=steps,
                warmup_steps=None,
                momentum=None,
                seed=seed,
                validate_every=None,
                save_every=None,
                tracker="none",
            )
            fit(short, opened, Path(folder), show=False, measure=collector)
        found = Tried(rate, collector.right, collector.kept)
        say(
            f"learning rate {rate:.2g}: {100 * found.accuracy:.1f} % of {len(found.right)} held-out"
            f" images right at alpha {recipe.alpha:g}, {100 * found.kept:.1f} % of the base's"
            f" answers kept ({time.monotonic() - began:.0f} s)"
        )
        return found

    most = len(START) + WIDENINGS + 1
    say(f"choosing the learning rate by {len(START) + 1} to {most} short runs")
    tried = [short_run(rate, recipe.seed) for rate in START]
    for _ in range(WIDENINGS):
        beyond = wider(tried)
        if beyond is None:
            break
        tried.append(short_run(beyond, recipe.seed))
    chosen = nearest(tried)
    again = short_run(chosen.learning_rate, recipe.seed + 1)
    notes = _notes(tried, chosen, again)
    recipe = dataclasses.replace(
        recipe,
        learning_rate=chosen.learning_rate,
        min_learning_rate=min(recipe.min_learning_rate, chosen.learning_rate),
    )
    _write(out, chosen, again, tried, notes)
    say(f"chose learning rate {chosen.learning_rate:.2g}; {out / RATES} has the table")
    return recipe, notes


def wider(tried: Sequence[Tried]) -> float | None:
    """The rate to try next: beyond the edge of the grid where the best is, or none.

    Args:
        tried: short runs of one seed, at rates of `GRID`.
    """
    best = _best(tried).learning_rate
    place = GRID.index(best)
    rates = [one.learning_rate for one in tried]
    if best == max(rates) and best < GRID[-1]:
        return GRID[place + 1]
    if best == min(rates) and best > GRID[0]:
        return GRID[place - 1]
    return None


def nearest(tried: Sequence[Tried]) -> Tried:
    """From the best rate towards the paper's, as long as each is within one standard error of the
    best.

    The error is that of the paired difference over the held-out images (the one-standard-error
    rule of Breiman et al., Classification and Regression Trees, 1984).

    Args:
        tried: short runs of one seed, at rates of `GRID`.
    """
    best = _best(tried)
    low, high = sorted([best.learning_rate, PAPER])
    way = [one for one in tried if low <= one.learning_rate <= high]
    chosen = best
    for one in sorted(way, key=_away, reverse=True):
        if best.accuracy - one.accuracy > _error(best, one):
            break
        chosen = one
    return chosen


def _best(tried: Sequence[Tried]) -> Tried:
    """The most accurate one; of equals the nearest to the paper's, of two as near the lower one,
    which keeps more of the base.
    """
    return min(tried, key=lambda one: (-round(one.accuracy, 9), *_away(one)))


def _away(one: Tried) -> tuple[int, float]:
    """How far its rate is from the paper's in the grid; and the rate, which orders two as far."""
    return abs(GRID.index(one.learning_rate) - GRID.index(PAPER)), one.learning_rate


def _error(one: Tried, other: Tried) -> float:
    """The standard error of the difference of two accuracies on the same images."""
    differences = one.right.astype(np.float64) - other.right.astype(np.float64)
    return float(np.std(differences) / len(differences) ** 0.5)


def _notes(tried: Sequence[Tried], chosen: Tried, again: Tried) -> list[str]:
    """What the search can't settle, a line each."""
    notes = []
    best = _best(tried).learning_rate
    rates = [one.learning_rate for one in tried]
    if best in (min(rates), max(rates)):
        notes.append(
            f"warning: the best learning rate, {best:.2g}, is at the edge of"
            " what was tried; see whether the loss falls, or give a rate of your own"
        )
    difference = abs(again.accuracy - chosen.accuracy)
    if difference > 1.96 * _error(chosen, again):
        notes.append(
            f"warning: two seeds differ by {100 * difference:.1f} points at learning rate"
            f" {chosen.learning_rate:.2g}, more than held-out images explain; try --drop 0"
        )
    return notes


def _write(
    out: Path, chosen: Tried, again: Tried, tried: Sequence[Tried], notes: Sequence[str]
) -> None:
    table = {
        "chosen": chosen.learning_rate,
        "rule": "from the best rate towards 5e-4, as long as each rate is within one standard error"
        " of the best on held-out images",
        "tried": [_row(one) for one in sorted(tried, key=lambda one: one.learning_rate)],
        "second_seed": _row(again),
        "notes": list(notes),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with staged(out / RATES) as temporary:
            temporary.write_text(json.dumps(table, indent=2), encoding="utf-8")
    except OSError as error:
        raise RAdapterError(f"could not write {out / RATES}: {error.strerror}") from error


def _row(one: Tried) -> dict[str, float]:
    return {
        "learning_rate": one.learning_rate,
        "accuracy": round(100 * one.accuracy, 2),
        "base_answers_kept": round(100 * one.kept, 2),
        "images": len(one.right),
    }
