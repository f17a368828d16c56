"""`python -m rivals.beyond`: what came after the paper, each against R-Adapter with one α for all
layers.

For each candidate the α is found at which its accuracy in distribution on the validation sets, a
mean over the seeds, is that of R-Adapter at the α of the comparison. Test sets are judged at that α
alone, and choose nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
import tyro

from radapter_serve.cli import run as run_command
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.rows import by_shift, own_metric
from rivals.cells import ALPHAS, Cells, Judged
from rivals.choice import choose
from rivals.flags import Flags, check_seeds
from rivals.layout import T95, markdown, paired_leads, with_interval
from rivals.make import command_line, machine, publish, say
from rivals.method import learned
from rivals.methods import METHODS
from rivals.radapter import RAdapter
from rivals.run import Run
from rivals.schedule import EVEN, AlphaSchedule
from rivals.system import Learned
from rivals.variants import Variant

_EXPLAINED = """Each candidate has the α at which its accuracy in distribution on the validation
sets, a mean over the seeds, is that of R-Adapter; one that has it nowhere is left out. R-Adapter's
row has accuracies in %. The others have what they lead R-Adapter of the same seed by, in points,
with the interval of 95 % of that mean."""
REFERENCE = "R-Adapter"
TRAININGS: dict[str, tuple[Variant, dict[str, Any]]] = {
    "trajectory average": (Variant(average="trajectory"), {}),
    "dropping falls from 0.2": (Variant(falling=True), {}),
    "dropping falls from 0.9": (Variant(falling=True), {"drop": 0.9}),
    "learned scale": (Variant(learned_scale=True), {}),
}
SCHEDULES = {
    **{f"α of depth × {depth:g}": AlphaSchedule(depth=depth) for depth in (0.75, 0.5, 0.25, 0.0)},
    **{f"α of image × {share:g}": AlphaSchedule(image=share) for share in (0.5, 0.0)},
    **{f"α of text × {share:g}": AlphaSchedule(text=share) for share in (0.5, 0.0)},
}


@dataclass(frozen=True)
class Scheduled(RAdapter):
    """R-Adapter, with α multiplied by a constant of each layer: its end is nearer to the start
    where that is below 1.

    Attributes:
        schedule: those constants.
    """

    schedule: AlphaSchedule = EVEN

    def learn(self, run: Run) -> Learned:
        found = learned(RAdapter(self.settings), run)
        state = found.system.state_dict()  # shares memory with the system, and asks for no gradient
        clip = {name.removeprefix("model."): name for name in found.end}
        for key, factor in self.schedule.factors(clip).items():
            name = clip[key]
            state[name].copy_(
                torch.lerp(found.start[name].float(), found.end[name].float(), factor)
            )
        return Learned(found.system, found.cost)


def candidates(reference: RAdapter) -> dict[str, RAdapter]:
    """R-Adapter itself, its other trainings, and its schedules of α, by name."""
    trained = {
        name: dataclasses.replace(
            reference, settings={**reference.settings, **changes}, variant=variant
        )
        for name, (variant, changes) in TRAININGS.items()
    }
    scheduled = {
        name: Scheduled(reference.settings, schedule=schedule)
        for name, schedule in SCHEDULES.items()
    }
    return {REFERENCE: reference, **trained, **scheduled}


def equal_alpha(scores: Mapping[float, float], target: float, alpha: float) -> float | None:
    """Where a candidate is as good as R-Adapter is; of several such α the one nearest to
    R-Adapter's.

    Args:
        scores: of the candidate, by α, ascending; between two of them the score is taken to be a
            straight line.
        target: R-Adapter's score.
        alpha: R-Adapter's α.

    Returns:
        None where the candidate has that score nowhere.
    """
    found = []
    for (low, first), (high, second) in pairwise(scores.items()):
        if first == second == target:
            found.append(min(max(alpha, low), high))
        elif min(first, second) <= target <= max(first, second):
            found.append(low + (high - low) * (target - first) / (second - first))
    return min(found, key=lambda value: abs(value - alpha), default=None)


def in_distribution(rows: Sequence[Judged]) -> float:
    """The mean accuracy in per cent of the sets in distribution."""
    ids, _ = by_shift({row.dataset: row for row in rows})
    return mean(own_metric(row) for row in rows if row.dataset in ids)


def groups(rows: Sequence[Judged]) -> dict[str, float]:
    """In distribution, the mean of the shifts where there are any, and each shifted set: accuracy
    in per cent.
    """
    values = {row.dataset: own_metric(row) for row in rows}
    _, shifted = by_shift({row.dataset: row for row in rows})
    of_shifts = {name: values[name] for name in shifted}
    middle = {"mean of the shifts": mean(of_shifts.values())} if shifted else {}
    return {"in distribution": in_distribution(rows), **middle, **of_shifts}


def compare(
    cells: Cells, methods: Mapping[str, RAdapter], seeds: Sequence[int], alpha: float
) -> str:
    """Candidates down, the α of each and its lead over R-Adapter across, as Markdown.

    Args:
        cells: of the benchmark.
        methods: R-Adapter, then its candidates, as `candidates` gives them.
        seeds: each learns once for each.
        alpha: of R-Adapter.
    """
    first: list[dict[str, float]] = []
    target = 0.0
    lines = []
    for name, method in methods.items():
        of_seeds = [cells.cell(name, method, seed, ALPHAS, "validation").rows for seed in seeds]
        scores = {
            alpha: mean(
                in_distribution([row for row in rows if row.alpha == alpha]) for rows in of_seeds
            )
            for alpha in ALPHAS
        }
        target = scores[alpha] if name == REFERENCE else target
        at = alpha if name == REFERENCE else equal_alpha(scores, target, alpha)
        if at is None:
            lines.append([name, "nowhere", *[""] * len(first[0])])
            continue
        tested = [groups(cells.cell(name, method, seed, [round(at, 3)]).rows) for seed in seeds]
        if name == REFERENCE:
            first = tested
            lines.append(
                [
                    name,
                    f"{at:.2f}",
                    *(with_interval([of[head] for of in first]) for head in first[0]),
                ]
            )
            continue
        own, led = ([list(one.values()) for one in of] for of in (tested, first))
        lines.append([name, f"{at:.2f}", *paired_leads(own, led)])
    return markdown(["candidate", "α", *first[0]], lines)


def beyond(
    flags: tyro.conf.OmitArgPrefixes[Flags],
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    alpha: float = 0.5,
    rates: tuple[float, ...] = (1.0,),
) -> None:
    """Compare what came after the paper with R-Adapter, at equal accuracy in distribution; print
    it, write Markdown.

    Args:
        flags: of all candidates; with those of rivals.table its R-Adapter is taken.
        seeds: each candidate learns once for each; 10 at most.
        alpha: of R-Adapter, to compare at: 0, 0.1, and so on to 1.
        rates: factors of R-Adapter's learning rate, of which the validation sets choose one;
            one factor is taken as it is.
    """
    if alpha not in ALPHAS:
        raise RAdapterError(
            f"--alpha is {alpha}; allowed: {', '.join(f'{value:g}' for value in ALPHAS)}"
        )
    check_seeds(seeds, len(T95) + 1)
    benchmark = flags.benchmark()
    out = flags.out
    for split in ("validation", "test"):
        if all(entry.shift != "id" for entry in benchmark.suite.of_split(split)):
            raise RAdapterError(
                f"the suite {benchmark.name} has no set with split: {split} and shift: id;"
                " candidates are compared where they are equal there"
            )
    cells = Cells(benchmark, out, "beyond", flags.limit, say)
    reference = choose(cells, "r-adapter", [METHODS["r-adapter"]], seeds, rates).method
    assert isinstance(reference, RAdapter)
    shown = compare(cells, candidates(reference), seeds, alpha)
    how = [
        f"`{command_line('rivals.beyond')}`, {datetime.date.today()}, {machine()}.",
        f"Benchmark {benchmark.name}, seeds {', '.join(map(str, seeds))}. {_EXPLAINED}",
    ]
    parts = [
        "# Beyond the paper: what came after it, put into R-Adapter",
        *how,
        *cells.warnings(),
        shown,
    ]
    publish(parts, out / "beyond.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(beyond, argv, prog="python -m rivals.beyond")


if __name__ == "__main__":
    sys.exit(main())
