"""What came after the paper, each against R-Adapter with one α for all layers, at equal accuracy in distribution.

For each candidate the α is found at which its accuracy on the suite's in-distribution validation sets, a mean over the
seeds, is that of R-Adapter at the α of the comparison. Test sets are evaluated at that α alone, and choose nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import RESULTS, Report, say

from radapter_serve.adapter import load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.demo.data import BASE
from radapter_serve.evaluation.results import Results, own_metric
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Suite, load_suite
from radapter_serve.evaluation.torch_embedder import embedder_of
from radapter_serve.release.alpha_schedule import EVEN, AlphaSchedule
from radapter_serve.training import Recipe, train

GRID = [round(0.1 * step, 1) for step in range(11)]
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # of Student's t, for 2 to 10 seeds
RECIPE = Recipe(
    momentum=None, batch_size=64, epochs=10, crop_scale=0.7, flip=True, workers=0, save_every=None, tracker="none"
)
TRAININGS: dict[str, dict[str, Any]] = {
    "R-Adapter": {},
    "trajectory average": {"average": "trajectory"},
    "dropping falls from 0.2": {"drop_schedule": "falling"},
    "dropping falls from 0.9": {"drop": 0.9, "drop_schedule": "falling"},
    "learned scale": {"learned_scale": True},
}
SCHEDULES = [
    *(AlphaSchedule(depth=depth) for depth in (0.75, 0.5, 0.25, 0.0)),
    *(AlphaSchedule(image=share) for share in (0.5, 0.0)),
    *(AlphaSchedule(text=share) for share in (0.5, 0.0)),
]


@dataclass(frozen=True)
class Candidate:
    """A training, and a schedule of α over the layers of what it learned."""

    training: str
    schedule: AlphaSchedule = EVEN

    @property
    def name(self) -> str:
        """In the table."""
        changed = {name: value for name, value in dataclasses.asdict(self.schedule).items() if value != 1}
        return ", ".join([self.training, *(f"α of {name} × {value:g}" for name, value in changed.items())])


REFERENCE = Candidate("R-Adapter")
CANDIDATES = [*map(Candidate, TRAININGS), *(Candidate("R-Adapter", schedule) for schedule in SCHEDULES)]
# For each α of a candidate, the accuracy of each data set in per cent.
Curve = dict[float, dict[str, float]]


def main() -> None:
    """Train everything once a seed, find each candidate's α, evaluate at it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="training data, as radapter-train takes it")
    parser.add_argument("--suite", required=True, help="with an in-distribution validation set and shifted test sets")
    parser.add_argument("--data-root", default=".", help="folder that the suite's paths start from")
    parser.add_argument("--architecture", default=f"local-dir:{BASE}", help="base; the demo's small one by default")
    parser.add_argument("--pretrained", help="open_clip tag or checkpoint of the base")
    parser.add_argument("--alphas", type=float, nargs="+", choices=GRID, default=[0.5, 0.8], help="to compare at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the fine-tuning")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="of the fine-tuning")
    parser.add_argument("--limit", type=int, default=1000, help="images of a data set at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    suite = load_suite(arguments.suite, arguments.data_root)
    report = Report(
        "beyond",
        "Beyond the paper: what came after it, put into R-Adapter",
        f"{suite.name}, {arguments.limit} images of a data set at most, {arguments.epochs} epochs in batches of "
        f"{RECIPE.batch_size}, seeds {', '.join(map(str, arguments.seeds))}. Each candidate has the α at which its "
        "accuracy on the in-distribution validation sets, a mean over the seeds, is that of R-Adapter. Differences "
        "are in points, candidate less R-Adapter of the same seed, with the interval that holds their mean in 95 % of "
        "cases. α = 1 is the most that there is: a candidate that would need more is left out.",
        timed=False,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            (training, seed): _train(arguments, folder, training, seed)
            for training in TRAININGS
            for seed in arguments.seeds
        }
        options = {"suite": suite, "limit": arguments.limit}
        validation = {
            seed: _curves(runs, seed, dict.fromkeys(CANDIDATES, GRID), split="validation", **options)
            for seed in arguments.seeds
        }
        for alpha in arguments.alphas:
            found = _alphas(validation, suite, alpha)
            wanted = {one: [value] for one, value in found.items() if value is not None}
            tested = {seed: _curves(runs, seed, wanted, split="test", **options) for seed in arguments.seeds}
            report.table(f"At R-Adapter's α = {alpha:g}", *_table(found, tested, suite))
    report.write(arguments.out)


def _train(arguments: argparse.Namespace, folder: Path, training: str, seed: int) -> Path:
    say(f"seed {seed}: {training}")
    common = {name: getattr(arguments, name) for name in ("data", "architecture", "pretrained", "epochs")}
    out = folder / f"{training} {seed}"
    return train(dataclasses.replace(RECIPE, **common, **TRAININGS[training], seed=seed, out=out))


def _curves(
    runs: Mapping[tuple[str, int], Path],
    seed: int,
    alphas: Mapping[Candidate, Sequence[float]],
    *,
    suite: Suite,
    split: str,
    limit: int,
) -> dict[Candidate, Curve]:
    """The accuracy of candidates at their α on the sets of a split; images are read once for each training."""
    curves: dict[Candidate, Curve] = {one: {} for one in alphas}
    for training in TRAININGS:
        say(f"seed {seed}: {split} by {training}")
        run = runs[training, seed]
        adapter = load_adapter(run)
        base = load_base(adapter.metadata.architecture, adapter.metadata.pretrained)
        embedder = embedder_of(base, adapter, [1.0])
        [whole] = embedder.variants
        mine = {(one.schedule, value): one for one in alphas if one.training == training for value in alphas[one]}
        variants = [dataclasses.replace(whole, schedule=schedule, alpha=value) for schedule, value in mine]
        results = Results(run / split, resume=True)
        for row in evaluate_suite(embedder, suite, results, split=split, variants=variants, limit=limit):
            one = mine[AlphaSchedule(**row.get("alpha_schedule", {})), row["alpha"]]
            curves[one].setdefault(row["alpha"], {})[row["dataset"]] = own_metric(row)
        embedder.close()
    return curves


def _alphas(
    validation: Mapping[int, Mapping[Candidate, Curve]], suite: Suite, alpha: float
) -> dict[Candidate, float | None]:
    """Where each candidate is as good as R-Adapter in distribution, on validation data; None where it never is."""
    names = _names(suite, "validation", "id")

    def score(one: Candidate, at: float) -> float:
        return statistics.mean(
            statistics.mean(curves[one][at][name] for name in names) for curves in validation.values()
        )

    def nearest(one: Candidate, target: float) -> float | None:
        """Of the α at which the curve crosses the target, the one nearest to R-Adapter's."""
        found = []
        for low, high in pairwise(GRID):
            first, second = score(one, low), score(one, high)
            if first == second == target:
                found.append(min(max(alpha, low), high))
            elif min(first, second) <= target <= max(first, second):
                found.append(low + (high - low) * (target - first) / (second - first))
        return min(found, key=lambda value: abs(value - alpha), default=None)

    target = score(REFERENCE, alpha)
    return {one: alpha if one == REFERENCE else nearest(one, target) for one in CANDIDATES}


def _table(
    found: Mapping[Candidate, float | None], tested: Mapping[int, Mapping[Candidate, Curve]], suite: Suite
) -> tuple[list[str], list[list[str]]]:
    """R-Adapter's accuracies, and the differences of the others."""
    groups = {"in distribution": _names(suite, "test", "id"), "mean of the shifts": _names(suite, "test", "ood")}
    groups |= {name: [name] for name in groups["mean of the shifts"]}
    rows = []
    for one, alpha in found.items():
        cells = [one.name, "more than 1" if alpha is None else f"{alpha:.2f}"]
        for names in groups.values():
            if alpha is None:
                cells.append("")
                continue
            own, base = (
                [statistics.mean(curves[each][found[each]][name] for name in names) for curves in tested.values()]  # type: ignore[index]
                for each in (one, REFERENCE)
            )
            differences = own if one == REFERENCE else [a - b for a, b in zip(own, base, strict=True)]
            cells.append(_with_interval(differences, sign="" if one == REFERENCE else "+"))
        rows.append(cells)
    return ["candidate", "α", *groups], rows


def _names(suite: Suite, split: str, shift: str) -> list[str]:
    names = [entry.name for entry in suite.of_split(split) if entry.shift == shift]
    if not names:
        raise SystemExit(f"the suite {suite.name} has no set with split: {split} and shift: {shift}")
    return names


def _with_interval(values: Iterable[float], *, sign: str) -> str:
    """A mean, ± the half of its 95 % interval where there are several values."""
    figures = list(values)
    mean = f"{statistics.mean(figures):{sign}.1f}"
    if len(figures) < 2:
        return mean
    return f"{mean} ± {T95[len(figures) - 2] * statistics.stdev(figures) / len(figures) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
