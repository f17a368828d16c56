"""Formats figures, tables and pages of results as Markdown, and draws pictures."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import torch
from matplotlib.figure import Figure

from rivals.method import Cost


def spread(values: Sequence[float]) -> str:
    """Format the mean over seeds, ± the standard deviation if there are several."""
    middle = f"{mean(values):.1f}"
    return f"{middle} ± {stdev(values):.1f}" if len(values) > 1 else middle


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
        panel.set_xlabel("%; the axis is cut")
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
