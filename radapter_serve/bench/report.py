"""What a load came to, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from radapter_client import Profile
from radapter_serve.bench.load import Closed, Measured, Open
from radapter_serve.errors import RAdapterError
from radapter_serve.extras import install_command
from radapter_serve.files import staged

PERCENTILES = (50, 90, 95, 99)
STAGES = ("network", "queue", "task", "encoder")


@dataclass(frozen=True)
class Row:
    """One task under one load.

    Args:
        task: for example `classify`.
        url: of the server.
        load: as people read it: "8 callers", "20/s".
        requests: that were answered.
        throughput: answers a second.
        latency: in ms, by percentile ("p50").
        errors: failed requests by kind.
        stages: mean ms in network, queue, task and encoder; None where the server keeps its statistics closed.
    """

    task: str
    url: str
    load: str
    requests: int
    throughput: float
    latency: dict[str, float]
    errors: dict[str, int]
    stages: dict[str, float] | None

    @classmethod
    def of(cls, task: str, url: str, load: Closed | Open, measured: Measured, profile: Profile | None) -> Row:
        """From a measurement and, where the server tells it, where the time went."""
        latency = measured.percentiles(*PERCENTILES)
        return cls(
            task,
            url,
            str(load),
            len(measured.latencies),
            measured.throughput,
            {f"p{which}": 1e3 * value for which, value in zip(PERCENTILES, latency, strict=True)},
            dict(measured.errors),
            None if profile is None else {stage: getattr(profile, stage) for stage in STAGES},
        )

    @property
    def protocol(self) -> str:
        """grpc, grpcs, http or https."""
        return self.url.partition(":")[0]

    @property
    def loop(self) -> str:
        """closed or open."""
        return "open" if self.load.endswith("/s") else "closed"


def latency_table(rows: Sequence[Row]) -> Table:
    """Answers, failures, and latency in ms."""
    columns = ["answers", "errors", "per s", *(f"p{which}" for which in PERCENTILES)]
    return _table(
        "latency, ms",
        columns,
        [
            (row, [str(row.requests), str(sum(row.errors.values())), f"{row.throughput:.1f}", *row.latency.values()])
            for row in rows
        ],
    )


def stages_table(rows: Sequence[Row]) -> Table:
    """Where the time goes, in ms, of the rows that know it."""
    return _table("where the time goes, ms", STAGES, [(row, [*row.stages.values()]) for row in rows if row.stages])


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[Row, Sequence[str | float]]]) -> Table:
    drawn = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("task", "protocol", "load"):
        drawn.add_column(column, no_wrap=True)
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    for row, cells in rows:
        drawn.add_row(
            row.task, row.protocol, row.load, *(one if isinstance(one, str) else _shown(one) for one in cells)
        )
    return drawn


def write_json(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """The rows and what they were measured with, as JSON; a latency of nothing is null."""
    values = [asdict(row) for row in rows]
    for value in values:
        value["latency"] = {k: None if math.isnan(v) else v for k, v in value["latency"].items()}
    with staged(path) as file:
        file.write_text(json.dumps({**facts, "rows": values}, indent=2, allow_nan=False), encoding="utf-8")


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture: latency against throughput, for each task, with a line for each protocol and each kind of loop.

    Raises:
        RAdapterError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise RAdapterError(f"the picture needs matplotlib; {install_command('train')}") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row.task for row in rows))
    across = min(len(tasks), 3)
    down = math.ceil(len(tasks) / across)
    size = max(8.0, 5.0 * across), max(5.0, 4.0 * down)
    figure, panels = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for task, axes in zip_longest(tasks, panels.flat):
        if task is None:
            axes.set_axis_off()
        else:
            _draw_task(axes, task, [row for row in rows if row.task == task and row.requests])
    with staged(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _draw_task(axes: Any, task: str, rows: Sequence[Row]) -> None:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{row.protocol}, {row.loop} loop", []).append(row)
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda row: row.throughput)
        across, colour = [row.throughput for row in points], f"C{number % 10}"
        axes.plot(across, [row.latency["p50"] for row in points], "o-", color=colour, label=f"{name}: p50")
        axes.plot(across, [row.latency["p99"] for row in points], "x--", color=colour, label="p99")
        for row in points:
            where = row.throughput, row.latency["p50"]
            axes.annotate(row.load, where, xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set(title=task, xlabel="answers a second", ylabel="latency, ms", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small")


def _shown(milliseconds: float) -> str:
    return "-" if math.isnan(milliseconds) else f"{milliseconds:.1f}"
