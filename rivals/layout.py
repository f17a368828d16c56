"""Formats figures, tables and pages of results as Markdown, and draws pictures."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from math import hypot
from pathlib import Path
from statistics import mean, median, stdev
from typing import TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import norm, sem, t

from radapter_serve.evaluation.metrics import paired_difference
from rivals.method import Cost

K = TypeVar("K")
Images = list[NDArray[np.float64]]  # each image's part of a figure, by set


def spread(values: Sequence[float]) -> str:
    """Format the mean over seeds, ± the standard deviation if there are several."""
    middle = f"{mean(values):.1f}"
    return f"{middle} ± {stdev(values):.1f}" if len(values) > 1 else middle


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """Format a mean, ± half of its 95 % interval if there are several values."""
    middle = f"{mean(values):{sign}.1f}"
    if len(values) < 2:
        return middle
    return f"{middle} ± {t.isf(0.025, len(values) - 1) * sem(values):.1f}"


def paired_leads(row: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[str]:
    """Format the leads of a row over a base, paired by seed; both hold figures by seed."""
    pairs = [zip(figures, others, strict=True) for figures, others in zip(row, base, strict=True)]
    differences = [[a - b for a, b in pair] for pair in pairs]
    return [with_interval(column, "+") for column in zip(*differences, strict=True)]


def lead_of(differences: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Compute a mean lead in points, half of its 95 % interval, and p, over images and seeds.

    The variance over images is that of each image's mean over the seeds. The variance over seeds is
    that of the means over the same images, so that the two add up; few seeds get Student's t.
    `differences` are float [seeds, images] of independent sets, which have equal weight.
    """
    by_image = [values.mean(axis=0) for values in differences]
    lead, half = paired_difference(by_image, [np.zeros(len(values)) for values in by_image])
    by_seed = np.mean([values.mean(axis=1) for values in differences], axis=0)
    if len(by_seed) > 1:
        half = hypot(half, float(t.isf(0.025, len(by_seed) - 1) * sem(by_seed)))
    if not half:
        return 100 * lead, 0.0, float(lead == 0)
    return 100 * lead, 100 * half, float(2 * norm.sf(norm.isf(0.025) * abs(lead) / half))


def lead_over(
    images: Sequence[Mapping[str, Images]], base: Sequence[Mapping[str, Images]], head: str
) -> tuple[float, float, float]:
    """Compute the lead in a column over a base, both by seed; returns the values of `lead_of`."""
    pairs = list(zip(images, base, strict=True))
    return lead_of(
        [
            np.stack([of_seed[head][number] - of_base[head][number] for of_seed, of_base in pairs])
            for number in range(len(pairs[0][0][head]))
        ]
    )


def holm(values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Mark the p-values that survive Holm's correction (Scand. Journal of Statistics, 1979)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    survives = [False] * len(values)
    for rank, place in enumerate(order):
        if values[place] > level / (len(values) - rank):
            break
        survives[place] = True
    return survives


def corrected(leads: Mapping[K, tuple[float, float, float]]) -> dict[K, str]:
    """Format leads of `lead_of`, bold if they survive Holm's correction over all of them."""
    survivors = holm([p for _, _, p in leads.values()])
    shown = {}
    for (place, (lead, half, _)), survives in zip(leads.items(), survivors, strict=True):
        text = f"{lead:+.1f} ± {half:.1f}"
        shown[place] = f"**{text}**" if survives else text
    return shown


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table, with the first column aligned left and the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def cost_of(costs: Sequence[Cost]) -> list[str]:
    """Format the cells of `COST`, dashes for a method without training; seconds are the median."""
    if not any(cost.parameters for cost in costs):
        return ["-", "-", "-"]
    seconds = median(cost.seconds for cost in costs)
    memory = max(cost.memory for cost in costs) / 1e9
    return [f"{costs[0].parameters / 1e6:.2f}", f"{seconds:.0f}", f"{memory:.2f}"]


COST = ["parameters, M", "time, s", "memory, GB"]


def dots(
    rows: Mapping[str, Sequence[Mapping[str, float]]], heads: Sequence[str], path: Path
) -> None:
    """Draw columns of a table, in per cent by method and seed: the mean, with a bar for the
    standard deviation.
    """
    figure = Figure(
        figsize=(4.5 * len(heads), 1.2 + 0.27 * len(rows)), dpi=150, layout="constrained"
    )
    panels = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
    for panel, head in zip(panels, heads, strict=True):
        for row, (name, values) in enumerate(rows.items()):
            figures = [of_seed[head] for of_seed in values]
            ours = "r-adapter" in name.lower()
            bar = stdev(figures) if len(figures) > 1 else None
            panel.errorbar(
                mean(figures),
                row,
                xerr=bar,
                capsize=2,
                color="tab:red" if ours else "tab:blue",
                marker="*" if ours else "o",
                markersize=9 if ours else 5,
            )
            if name.lower() == "zero-shot":
                panel.axvline(mean(figures), color="grey", linestyle="--", linewidth=1)
        panel.set_title(head, fontsize=10)
        panel.set_xlabel("%")
        panel.set_yticks(range(len(rows)), rows)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.savefig(path)


def origin(module: str) -> str:
    """Describe the command of this process, the date, the machine and the versions."""
    command = " ".join([f"python -m {module}", *map(shlex.quote, sys.argv[1:])])
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{len(os.sched_getaffinity(0))} CPU cores"
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"`{command}`, {datetime.date.today()}, {device}, {versions}."


def publish(parts: Sequence[str], path: Path) -> None:
    """Write the parts of a page of results as Markdown, and print it."""
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}")
    print(text)


def say(line: str) -> None:
    """Print a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
