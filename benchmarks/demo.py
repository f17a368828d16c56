"""The demo's figures over α and several seeds of fine-tuning, in and out of distribution, beside
full fine-tuning and WiSE-FT (Wortsman et al., CVPR 2022) of the same batches.

python benchmarks/demo.py                                        # the tables
python benchmarks/demo.py --choose full --rates 1e-4 2e-4 4e-4   # a rate, with validation drawings
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
import yaml
from common import RESULTS, Report, say

from radapter_serve.demo import DemoSettings
from radapter_serve.demo.data import BASE, FINE_TUNED, STYLES, DemoData, prepare, style_of
from radapter_serve.demo.full import ALPHAS, recipe_of, run_full
from radapter_serve.demo.run import evaluate, fields_of, suite_of
from radapter_serve.evaluation.rows import Results, Row
from radapter_serve.evaluation.run import open_set
from radapter_serve.training import train
from rivals.cells import judge
from rivals.full import FullFineTuning
from rivals.method import Run, learned

FULL = Path(__file__).parent / "full.yaml"
OURS = "R-Adapter"
RIVAL = "WiSE-FT"
Hits = Mapping[str, np.ndarray]  # by style, whether each of its images is right
Line = dict[float, dict[str, np.ndarray]]  # by α
Figures = list[tuple[str, int, dict[float, float]]]  # name, images, and per cent by α, of each set


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = RESULTS,
    choose: Literal["classification", "full"] | None = None,
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4),
    steps: int | None = None,
    limit: int | None = None,
) -> None:
    """Run the demo once a seed and write the means; or choose a rate.

    Args:
        seeds: of the fine-tuning.
        out: folder of the table.
        choose: recipe to try learning rates of.
        rates: to try with --choose.
        steps: of each fine-tuning; the recipes' own by default.
        limit: the most images of each data set; all by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = DemoSettings(Path(folder), steps=steps, limit=limit)
        if choose:
            try_rates(choose, rates, seeds, settings)
        else:
            report(seeds, out, settings)


def fine_tuned(
    data: DemoData, settings: DemoSettings, alphas: Sequence[float], rate: float | None = None
) -> list[Row]:
    """Rows of the demo's test drawings, by full fine-tuning at points of the line to its base."""
    fields = yaml.safe_load(FULL.read_text(encoding="utf-8"))
    fields |= fields_of(data)
    fields |= {"architecture": f"local-dir:{BASE}", "seed": settings.seed, "tracker": "none"}
    fields["steps"] = settings.steps or fields["steps"]
    fields["warmup_steps"] = min(fields["warmup_steps"], fields["steps"] // 10)
    fields["learning_rate"] = rate or fields["learning_rate"]
    method = FullFineTuning({})
    suite = suite_of(data)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(fields, Path(folder)).of(method.settings)
        sets = [open_set(suite, entry, limit=settings.limit) for entry in suite.entries]
        return judge(learned(method, run), run, sets, alphas)


def try_rates(
    name: str, rates: Sequence[float], seeds: Sequence[int], settings: DemoSettings
) -> None:
    """Print the accuracy on validation drawings, in %, over α for each learning rate."""
    folder = settings.out
    data = prepare(folder / "data", styles=(FINE_TUNED,))
    validation = dataclasses.replace(data, test={FINE_TUNED: data.val})
    for rate in rates:
        accuracies: dict[float, list[float]] = {}
        for seed in seeds:
            if name == "full":
                seeded = dataclasses.replace(settings, seed=seed)
                rows = fine_tuned(validation, seeded, ALPHAS, rate)
            else:
                recipe = dataclasses.replace(
                    recipe_of(name, folder / f"{rate:g}-{seed}", seed, settings.steps),
                    **fields_of(data),
                    learning_rate=rate,
                    tracker="none",
                )
                rows = evaluate(train(recipe).folder, ALPHAS, suite_of(validation), settings.limit)
            for row in rows:
                assert row.alpha is not None
                accuracies.setdefault(row.alpha, []).append(100 * row.metrics["acc1"])
        means = [f"α = {alpha:g} {statistics.mean(of):.1f}" for alpha, of in accuracies.items()]
        print(f"{name}, rate {rate:g}:", ", ".join(means))


def report(seeds: Sequence[int], out: Path, settings: DemoSettings) -> None:
    """Run the demo once a seed and write the mean of its α curves and of its comparison."""
    tables = Report(
        "demo",
        "The demo: robustness over α",
        "Figures in % on drawings that neither the base nor the fine-tuning has seen; one base, one"
        " split, the seeds vary the fine-tuning. Means over the seeds.",
        timed=False,
    )
    runs: list[dict[str, Any]] = []
    systems: list[dict[str, tuple[float, float]]] = []
    rivals: list[Figures] = []
    for seed in seeds:
        say(f"seed {seed}")
        seeded = dataclasses.replace(settings, seed=seed)
        runs.append(run_full(seeded))
        ours = line_of(Results(settings.out / "runs" / "classification").rows)
        theirs = line_of(fine_tuned(prepare(settings.out / "data"), seeded, (0.5, 1.0)))
        rival = {0.0: ours[0.0], **theirs}  # both start at the base
        systems.append(accuracies(ours, rival, runs[-1]["classification"]["alpha"]))
        sets = []
        for style, hits in rival[0.0].items():
            values = {alpha: 100 * float(of[style].mean()) for alpha, of in rival.items()}
            sets.append((style, len(hits), values))
        rivals.append(with_mean(sets))
    shown = ", ".join(map(str, seeds))
    compared(tables, systems, shown)
    for task in ("classification", "retrieval", "segmentation"):
        for metric in METRICS[task]:
            title = f"{task.capitalize()}: {metric}, seeds {shown}"
            curves(tables, title, [with_mean(figures(run[task]["rows"], metric)) for run in runs])
    curves(tables, f"Full fine-tuning over α ({RIVAL}): acc1, seeds {shown}", rivals)
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs)
    tables.note(f"Seconds of a whole demo, with drawing and training: {seconds}.")
    tables.write(out)


METRICS = {
    "classification": ("acc1",),
    "retrieval": tuple(f"image_retrieval_recall@{k}" for k in (1, 5, 10)),
    "segmentation": ("miou",),
}


def line_of(rows: Sequence[Row]) -> Line:
    """Whether each test image is right, by α and style."""
    line: Line = {}
    for row in rows:
        assert row.alpha is not None and row.per_image is not None
        line.setdefault(row.alpha, {})[row.dataset] = row.per_image
    return line


def accuracies(ours: Line, rival: Line, alpha: float) -> dict[str, tuple[float, float]]:
    """Accuracy of five systems in per cent, in distribution and as the mean of the shifts."""
    systems = {
        "zero-shot": ours[0.0],
        f"{OURS}, α = {alpha:g}": ours[alpha],
        f"{OURS}, α = 1": ours[1.0],
        "full fine-tuning": rival[1.0],
        f"{RIVAL}, α = 0.5": rival[0.5],
    }
    values = {}
    for name, hits in systems.items():
        shifts = [of_style.mean() for style, of_style in hits.items() if style != FINE_TUNED]
        values[name] = (100 * float(hits[FINE_TUNED].mean()), 100 * float(np.mean(shifts)))
    return values


def figures(rows: Sequence[Mapping[str, Any]], metric: str) -> Figures:
    """A metric of each data set in per cent, by α."""
    sets: dict[str, tuple[str, int, dict[float, float]]] = {}
    for row in rows:
        figures_of = sets.setdefault(row["dataset"], (row["dataset"], row["n"], {}))
        figures_of[2][row["alpha"]] = 100 * row["metrics"][metric]
    return list(sets.values())


def with_mean(sets: Figures) -> Figures:
    """Insert the mean of the shifts after the shifted sets."""
    shifts = [row for row in sets[1:] if row[0] in STYLES]
    mean = {alpha: statistics.mean(values[alpha] for *_, values in shifts) for alpha in sets[0][2]}
    row = (f"mean of the {len(shifts)} shifts", sum(n for _, n, _ in shifts), mean)
    return [sets[0], *shifts, row, *sets[len(shifts) + 1 :]]


def compared(
    tables: Report, of_seeds: Sequence[Mapping[str, tuple[float, float]]], seeds: str
) -> None:
    """Systems down; accuracies across."""
    rows = []
    for name in of_seeds[0]:
        columns = zip(*(systems[name] for systems in of_seeds), strict=True)
        rows.append([name, *(f"{statistics.mean(column):.1f}" for column in columns)])
    heads = ["system", "in distribution", "mean of the shifts"]
    tables.table(f"Classification: R-Adapter and others, seeds {seeds}", heads, rows)


def curves(tables: Report, title: str, of_seeds: Sequence[Figures]) -> None:
    """Data sets down, α across."""
    alphas = list(of_seeds[0][0][2])
    rows = []
    for place, (name, count, values) in enumerate(of_seeds[0]):
        cells = [style_of(name), f"{count:,}"]
        for alpha in alphas:
            shown = [sets[place][2][alpha] for sets in of_seeds] if alpha in values else []
            cells.append(f"{statistics.mean(shown):.1f}" if shown else "")
        rows.append(cells)
    tables.table(title, ["data", "images", *(f"α = {alpha:g}" for alpha in alphas)], rows)


if __name__ == "__main__":
    tyro.cli(main)
