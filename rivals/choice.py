"""What validation chooses for a method: its rate, its own settings and its α, by the mean of
the seeds that it is given.
"""

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
    """A method as it was tried.

    Attributes:
        method: with the rate, the settings and the α of this trial.
        scores: what validation gave, in %, one for each seed.
    """

    method: Method
    scores: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return float(self.method.settings.get("learning_rate", 0.0))


@dataclass(frozen=True)
class Choice:
    """What validation has chosen.

    Attributes:
        method: with the chosen rate, settings and α.
        tried: all trials, each at its best α, in the order in which they were made.
        at_edge: whether the chosen rate is the lowest or the highest that was tried, though the
            grid was widened.
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

    Trials that can't be told from the best take part, too, and the lowest rate of them is taken: a
    lower rate keeps more of the base. The grid of rates grows until the best and that one are
    inside.

    Args:
        cells: of the benchmark.
        name: of the method in its table.
        methods: of one row: the same method with other settings; one where there is nothing to
            choose but its rate.
        seeds: each trial learns once for each.
        factors: of the learning rate, to start from; one factor is taken as it is.
        alphas: to choose from, where the method has an α; the method's own if none is given.

    Raises:
        RAdapterError: the benchmark sets the rate for every method.
    """
    first = methods[0]
    rates = sorted(set(factors)) if "learning_rate" in first.settings else [1.0]
    if set(rates) != {1.0} and "learning_rate" in cells.benchmark.given:
        raise RAdapterError(
            "the benchmark sets learning_rate for every method; take it out, or leave out --rates"
        )
    choosing = bool(alphas) and first.alpha is not None
    if len(methods) == len(rates) == 1 and not choosing:
        return Choice(at_rate(first, rates[0]))
    tried: list[Tried] = []

    def trials(factor: float) -> None:
        for method in methods:
            tried.append(_tried(cells, name, at_rate(method, factor), seeds, alphas))

    for factor in rates:
        trials(factor)
    low = rates[0]
    high = rates[-1]
    step = (high / low) ** (1 / max(1, len(rates) - 1))
    for _ in range(WIDENINGS if len(rates) > 1 else 0):
        # The best is inside, and so is the lowest that can't be told from it.
        if _best(tried).rate == max(one.rate for one in tried):
            high = high * step
            trials(high)
        elif _lowest(tried).rate == min(one.rate for one in tried):
            low = low / step
            trials(low)
        else:
            break
    chosen = _lowest(tried)
    edges = (min(one.rate for one in tried), max(one.rate for one in tried))
    at_edge = len(rates) > 1 and bool({_best(tried).rate, chosen.rate} & {*edges})
    return Choice(chosen.method, tuple(tried), at_edge)


def differing(methods: Sequence[Method], one: Method) -> str:
    """The settings of one method in which the methods differ, but for the rate and α, in words."""

    def facts(method: Method) -> dict[str, object]:
        own = {
            field.name: getattr(method, field.name)
            for field in dataclasses.fields(method)
            if field.name not in ("settings", "alpha")
        }
        settings = {
            name: value for name, value in method.settings.items() if name != "learning_rate"
        }
        return {**own, **settings}

    mine = facts(one)
    others = [facts(method) for method in methods]
    names = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
    return ", ".join(f"{name} {mine[name]}" for name in names) or "-"


def _tried(
    cells: Cells, name: str, method: Method, seeds: Sequence[int], alphas: Sequence[float]
) -> Tried:
    """A trial at the α that validation likes best; of equals the smallest."""
    asked = [1.0] if method.alpha is None else sorted(alphas) or [method.alpha]
    of_seeds = [cells.cell(name, method, seed, asked, "validation").rows for seed in seeds]
    found = {
        alpha: tuple(score([row for row in rows if row.alpha == alpha]) for rows in of_seeds)
        for alpha in asked
    }
    alpha = max(asked, key=lambda one: (round(mean(found[one]), 6), -one))
    if method.alpha is not None:
        method = dataclasses.replace(method, alpha=alpha)
    return Tried(method, found[alpha])


def _best(tried: Sequence[Tried]) -> Tried:
    """The highest mean; of equals the lowest rate."""
    return max(tried, key=lambda one: (round(mean(one.scores), 6), -one.rate))


def _lowest(tried: Sequence[Tried]) -> Tried:
    """The lowest rate that can't be told from the best; of equal rates the better one."""
    best = _best(tried)
    equals = [one for one in tried if not _worse(one, best)]
    return min(equals, key=lambda one: (one.rate, -mean(one.scores)))


def _worse(one: Tried, best: Tried) -> bool:
    """Whether the mean of the paired differences of the seeds is more than its standard error below
    zero; without several seeds, whether it is below.
    """
    leads = [a - b for a, b in zip(best.scores, one.scores, strict=True)]
    count = len(leads)
    if count < 2:
        return mean(leads) > 0
    return bool(mean(leads) > stdev(leads) / count**0.5)
