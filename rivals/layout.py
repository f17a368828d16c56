"""Tables as Markdown, and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from matplotlib.figure import Figure

from rivals.system import Cost


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean of several seeds, ± the standard deviation where there are several."""
    middle = f"{mean(values):.{digits}f}"
    return f"{middle} ± {stdev(values):.{digits}f}" if len(values) > 1 else middle


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def cost_of(costs: Sequence[Cost]) -> list[str]:
    """Parameters in millions, seconds (the median) and peak memory in GB; nothing of what did not learn."""
    if not any(cost.parameters for cost in costs):
        return ["-", "-", "-"]
    memory = max(cost.memory for cost in costs) / 1e9
    return [f"{costs[0].parameters / 1e6:.2f}", f"{median(cost.seconds for cost in costs):.0f}", f"{memory:.2f}"]


COST = ["parameters, M", "time, s", "memory, GB"]


def scatter(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], axes: tuple[str, str], path: Path) -> None:
    """Draw methods by two figures, with a cross of their standard deviations over the seeds.

    Args:
        points: by method, both figures of each seed, in per cent.
        axes: what they are.
        path: of the picture.
    """
    figure = Figure(figsize=(6.5, 5), dpi=150, layout="constrained")
    panel = figure.subplots()
    for name, values in points.items():
        x, y = (mean(of) for of in values)
        across, up = (stdev(of) if len(of) > 1 else 0.0 for of in values)
        own = {"color": "tab:red", "marker": "*", "markersize": 10} if "R-Adapter" in name else {"marker": "o"}
        panel.errorbar(x, y, up, across, capsize=2, label=name, **own)  # type: ignore[arg-type]
        panel.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    panel.set_xlabel(axes[0])
    panel.set_ylabel(axes[1])
    panel.margins(0.15)
    panel.grid(alpha=0.3)
    figure.savefig(path)
