"""Tables as Markdown, and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from pathlib import Path
from statistics import mean, median, stdev
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import norm, sem, t

from radapter_serve.evaluation.metrics import paired_difference
from rivals.system import Cost

K = TypeVar("K")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean of several seeds, ± the standard deviation where there are several."""
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """A mean, ± the half of its 95 % interval where there are several values."""
    middle = f"{mean(values):{sign}.1f}"
    if len(values) < 2:
        return middle
    return f"{middle} ± {t.isf(0.025, len(values) - 1) * sem(values):.1f}"


def paired_leads(found: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> list[str]:
    """What a row's figures lead those of another row by, paired over the seeds.

    Args:
        found: of each seed the figures.
        first: the same of the other row.
    """
    pairs = [zip(own, other, strict=True) for own, other in zip(found, first, strict=True)]
    differences = [[a - b for a, b in pair] for pair in pairs]
    return [with_interval(column, "+") for column in zip(*differences, strict=True)]


def lead_of(differences: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """A mean lead in points, the half of its 95 % interval, and its p, over images and seeds.

    The variance over images is that of each image's mean over the seeds; that over seeds is of the
    same images, so that the two add up. Few seeds have Student's t.

    Args:
        differences: of each independent set, float [seeds, images], as many seeds in each; sets
            count alike.
    """
    each = [one.mean(axis=0) for one in differences]
    lead, half = paired_difference(each, [np.zeros(len(of)) for of in each])
    by_seed = np.mean([one.mean(axis=1) for one in differences], axis=0)
    if len(by_seed) > 1:
        half = hypot(half, float(t.isf(0.025, len(by_seed) - 1) * sem(by_seed)))
    if not half:
        return 100 * lead, 0.0, float(lead == 0)
    return 100 * lead, 100 * half, float(2 * norm.sf(norm.isf(0.025) * abs(lead) / half))


def holm(values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several p survive Holm's correction (Scandinavian Journal of Statistics, 1979)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    survives = [False] * len(values)
    for rank, place in enumerate(order):
        if values[place] > level / (len(values) - rank):
            break
        survives[place] = True
    return survives


def corrected(leads: Mapping[K, tuple[float, float, float]]) -> dict[K, str]:
    """Leads of `lead_of` as a page shows them: bold where they survive Holm's correction over all.

    Args:
        leads: by whatever names their places.
    """
    survivors = holm([p for _, _, p in leads.values()])
    shown = {}
    for (place, (lead, half, _)), survives in zip(leads.items(), survivors, strict=True):
        text = f"{lead:+.1f} ± {half:.1f}"
        shown[place] = f"**{text}**" if survives else text
    return shown


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def cost_of(costs: Sequence[Cost]) -> list[str]:
    """Parameters in millions, seconds (the median) and peak memory in GB; nothing of what did not
    learn.
    """
    if not any(cost.parameters for cost in costs):
        return ["-", "-", "-"]
    memory = max(cost.memory for cost in costs) / 1e9
    return [
        f"{costs[0].parameters / 1e6:.2f}",
        f"{median(cost.seconds for cost in costs):.0f}",
        f"{memory:.2f}",
    ]


COST = ["parameters, M", "time, s", "memory, GB"]


def dots(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    heads: tuple[str, str],
    path: Path,
) -> None:
    """Draw methods down and two figures across: the mean over the seeds, a bar of their standard
    deviation.

    Args:
        points: by method, both figures of each seed, in per cent.
        heads: what they are.
        path: of the picture.
    """
    figure = Figure(figsize=(9, 1.2 + 0.27 * len(points)), dpi=150, layout="constrained")
    for panel, head, number in zip(figure.subplots(1, 2, sharey=True), heads, (0, 1), strict=True):
        for row, (name, values) in enumerate(points.items()):
            figures = values[number]
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
        panel.set_yticks(range(len(points)), points)
        panel.grid(axis="x", alpha=0.3)
    panel.invert_yaxis()
    figure.savefig(path)
