"""The choice of a method's rate, settings and α by validation, over several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from radapter_serve.errors import RAdapterError
from rivals.cells import Cells, score
from rivals.method import Method, at_rate

CHOICES = (0.25, 0.5, 0.75, 1.0)  # of α: a curve over α is smooth, and each costs an evaluation
WIDENINGS = 3  # of the grid of rates


@dataclass(frozen=True)
class Tried:
    """A method with the rate, settings and α of a trial, and its validation score in %, by seed."""

    method: Method
    scores: tuple[float, ...]

    @property
    def rate(self) -> float:
        return float(self.method.settings.get("learning_rate", 0.0))


@dataclass(frozen=True)
class Choice:
    """The chosen method, and all trials in their order, each at its best α.

    `at_edge` is set if the rate is the lowest or highest that was tried, although the grid grew.
    """

    method: Method
    tried: tuple[Tried, ...] = ()
    at_edge: bool = False


def choose(
    cells: Cells,
    name: str,
    methods: Sequence[Method],
    seeds: Sequence[int],
    factors: Sequence[float],
    alphas: Sequence[float] = (),
) -> Choice:
    """Let the validation sets choose among rates, settings and α.

    Of the trials that do not differ significantly from the best, the lowest rate is taken: a lower
    rate keeps more of the base. The grid of rates grows until the best and that one are inside.

    Args:
        cells: of the benchmark.
        name: of the method in its table.
        methods: a method with each of the settings to choose from.
        seeds: of training; a score is the mean over them.
        factors: of the learning rate, to start from; a single factor is not chosen, but taken.
        alphas: to choose from, if the method has an α; without them it keeps its own.
    """
    first = methods[0]
    rates = sorted(set(factors)) if "learning_rate" in first.settings else [1.0]
    if set(rates) != {1.0} and "learning_rate" in cells.benchmark.fields:
        raise RAdapterError(
            "the benchmark sets learning_rate for every method; take it out, or leave out --rates"
        )
    choosing = bool(alphas) and first.alpha is not None
    if len(methods) == len(rates) == 1 and not choosing:
        return Choice(at_rate(first, rates[0]))
    tried: list[Tried] = []

    def add_trials(factor: float) -> None:
        for method in methods:
            tried.append(_tried(cells, name, at_rate(method, factor), seeds, alphas))

    for factor in rates:
        add_trials(factor)
    low = rates[0]
    high = rates[-1]
    step = (high / low) ** (1 / max(1, len(rates) - 1))
    for _ in range(WIDENINGS if len(rates) > 1 else 0):
        if _best(tried).rate == max(trial.rate for trial in tried):
            high = high * step
            add_trials(high)
        elif _lowest(tried).rate == min(trial.rate for trial in tried):
            low = low / step
            add_trials(low)
        else:
            break
    chosen = _lowest(tried)
    edges = {min(trial.rate for trial in tried), max(trial.rate for trial in tried)}
    at_edge = len(rates) > 1 and bool({_best(tried).rate, chosen.rate} & edges)
    return Choice(chosen.method, tuple(tried), at_edge)


def differing(methods: Sequence[Method], method: Method) -> str:
    """Name the settings of a method in which the methods differ, without the rate and α."""

    def facts(method: Method) -> dict[str, object]:
        values = {
            field.name: getattr(method, field.name)
            for field in dataclasses.fields(method)
            if field.name not in ("settings", "alpha")
        }
        settings = {
            name: value for name, value in method.settings.items() if name != "learning_rate"
        }
        return {**values, **settings}

    mine = facts(method)
    others = [facts(other) for other in methods]
    names = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
    return ", ".join(f"{name} {mine[name]}" for name in names) or "-"


def _tried(
    cells: Cells, name: str, method: Method, seeds: Sequence[int], alphas: Sequence[float]
) -> Tried:
    """Try a method at its best α; of equals the smallest."""
    points = [1.0] if method.alpha is None else sorted(alphas) or [method.alpha]
    of_seeds = [cells.cell(name, method, seed, points, "validation").rows for seed in seeds]
    scores = {
        alpha: tuple(score([row for row in rows if row.alpha == alpha]) for rows in of_seeds)
        for alpha in points
    }
    best = max(points, key=lambda alpha: (round(mean(scores[alpha]), 6), -alpha))
    if method.alpha is not None:
        method = dataclasses.replace(method, alpha=best)
    return Tried(method, scores[best])


def _best(tried: Sequence[Tried]) -> Tried:
    """Find the highest mean; of equals the lowest rate."""
    return max(tried, key=lambda trial: (round(mean(trial.scores), 6), -trial.rate))


def _lowest(tried: Sequence[Tried]) -> Tried:
    """Find the lowest rate among the best and its equals; of equal rates the better trial."""
    best = _best(tried)
    equals = [trial for trial in tried if not _worse(trial, best)]
    return min(equals, key=lambda trial: (trial.rate, -mean(trial.scores)))


def _worse(trial: Tried, best: Tried) -> bool:
    """Compare by the paired differences of the seeds: worse means by more than a standard error."""
    leads = [a - b for a, b in zip(best.scores, trial.scores, strict=True)]
    if len(leads) < 2:
        return mean(leads) > 0
    return bool(mean(leads) > stdev(leads) / len(leads) ** 0.5)
