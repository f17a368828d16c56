"""The demo's figures over α and several seeds of fine-tuning, in and out of distribution.

python benchmarks/demo.py                                        # the tables
python benchmarks/demo.py --choose full --rates 1e-4 2e-4 4e-4   # a rate, by validation drawings
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from common import RESULTS, Report, say, with_spread

from radapter_serve.demo import DemoSettings
from radapter_serve.demo.compare import ALPHAS, RIVAL, lead_in_words, right, wise_ft
from radapter_serve.demo.data import FINE_TUNED, prepare, style_of
from radapter_serve.demo.full import fine_tune, run_full
from radapter_serve.demo.run import fields_of, recipe_of
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.training import train


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = RESULTS,
    choose: Literal["classification", "full"] | None = None,
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4),
) -> None:
    """Run the demo once a seed and write the means; or choose a rate.

    Args:
        seeds: of the fine-tuning.
        out: folder of the table.
        choose: recipe to try learning rates of.
        rates: to try with --choose.
    """
    with tempfile.TemporaryDirectory() as folder:
        if choose:
            try_rates(choose, rates, seeds, Path(folder))
        else:
            report(seeds, out, Path(folder))


def try_rates(name: str, rates: Sequence[float], seeds: Sequence[int], folder: Path) -> None:
    """Print the accuracy on validation drawings, in %, over α for each learning rate."""
    data = prepare(folder / "data", styles=(FINE_TUNED,))
    validation = dataclasses.replace(data, test={FINE_TUNED: data.val})
    for rate in rates:
        found: dict[float, list[float]] = {}
        for seed in seeds:
            recipe = dataclasses.replace(
                recipe_of(name, folder / f"{rate:g}-{seed}", seed, None),
                **{**fields_of(data), "val_data": None},
                learning_rate=rate,
                tracker="none",
            )
            if name == "full":
                models = wise_ft(fine_tune(recipe), ALPHAS)
            else:
                models = from_adapter(train(recipe).folder, ALPHAS)
            for alpha, hits in right(models, validation).items():
                found.setdefault(alpha, []).append(100 * float(hits[FINE_TUNED].mean()))
        print(
            f"{name}, rate {rate:g}:",
            ", ".join(f"α = {alpha:g} {with_spread(of)}" for alpha, of in found.items()),
        )


def report(seeds: Sequence[int], out: Path, folder: Path) -> None:
    """Run the demo once a seed and write the mean of its α curves and of its comparison."""
    tables = Report(
        "demo",
        "The demo: robustness over α",
        "Figures in % on drawings that neither the base nor the fine-tuning has seen; one base, one"
        " split, the seeds vary the fine-tuning. Mean over the seeds, ± the standard deviation. A"
        " lead is R-Adapter's over the system, the mean over the seeds, with the widest of the"
        " seeds' intervals of 95 %, which are over images.",
        timed=False,
    )
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        say(f"seed {seed}")
        runs.append(run_full(DemoSettings(folder, seed=seed)))
    shown = ", ".join(map(str, seeds))
    compared(tables, [run["classification"]["systems"] for run in runs], shown)
    for task in ("classification", "retrieval", "segmentation"):
        found = [run[task] for run in runs]
        for number, metric in enumerate(found[0]["metrics"]):
            curves(
                tables,
                f"{task.capitalize()}: {metric}, seeds {shown}",
                [of["sets"] for of in found],
                number,
            )
    title = f"Full fine-tuning over α ({RIVAL}): acc1, seeds {shown}"
    curves(tables, title, [run["classification"][RIVAL] for run in runs], 0)
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
    tables.note(f"Seconds of a whole demo, with drawing, training, export and serving: {seconds}.")
    tables.write(out)


def compared(tables: Report, of_seeds: list[list[dict[str, Any]]], seeds: str) -> None:
    """Systems down; accuracy and R-Adapter's lead across."""
    groups = ("in_distribution", "shifts")
    rows = []
    for place, system in enumerate(of_seeds[0]):
        cells = [system["system"]]
        for group in groups:
            of = [facts[place][group] for facts in of_seeds]
            lead = statistics.mean(one["lead"] for one in of)
            interval = max(one["interval"] for one in of)
            cells.append(with_spread([one["accuracy"] for one in of]))
            cells.append(lead_in_words(lead, interval) if interval else "")
        rows.append(cells)
    heads = [f"{name}, {of_seeds[0][0][group]['n']:,} images" for name, group in
             zip(("in distribution", "mean of the shifts"), groups, strict=True)]  # fmt: skip
    columns = ["system", heads[0], "R-Adapter's lead", heads[1], "R-Adapter's lead"]
    tables.table(f"Classification: R-Adapter and others, seeds {seeds}", columns, rows)


def curves(tables: Report, title: str, of_seeds: list[list[Any]], number: int) -> None:
    """Data sets down, α across."""
    alphas = list(of_seeds[0][0][2])
    rows = []
    for place, (name, count, values) in enumerate(of_seeds[0]):
        cells = [style_of(name), f"{count:,}"]
        for alpha in alphas:
            figures = (
                [sets[place][2][alpha][number] for sets in of_seeds] if alpha in values else []
            )
            cells.append(with_spread(figures) if figures else "")
        rows.append(cells)
    tables.table(title, ["data", "images", *(f"α = {alpha:g}" for alpha in alphas)], rows)


if __name__ == "__main__":
    tyro.cli(main)
