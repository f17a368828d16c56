"""Every task of a server under load: closed loop with more callers each time, open loop at
rates.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import tyro
from common import LABEL_SET, RESULTS, Process, Report, export, picture, say
from loop import PERCENTILES, Closed, Measured, Open, Send, Stages, measure, read_totals

from radapter_client import AsyncClient
from radapter_serve.encoders.loaded import load_release
from radapter_serve.files import staged
from radapter_serve.index.build import build
from radapter_serve.server.config import Endpoints, ServerConfig
from radapter_serve.server.triton_server import TritonServer

TASKS = ("classify", "embed_image", "embed_text", "retrieve", "segment")
STAGES = tuple(field.name for field in fields(Stages))
OBJECTS = ("bicycle", "bird", "boat", "car", "cat", "dog", "house", "person", "street", "tree")
LABELS = tuple(f"a {name}" for name in OBJECTS)
INDEX = "pictures"
SLOW = 300.0  # ms; no short text takes as long unless it waits
WHAT = """Requests of our own client to a server as radapter-serve starts it. Client and server
share the machine. Images are JPEG files of {width} x {height} pixels; classify and segment have a
label set of {labels} labels, retrieve an index of {images} images; every text is another one.
Each row was measured for {seconds:g} s, after {warmup:g} s that do not count."""


@dataclass(frozen=True)
class Row:
    """A task of a server under a load, with the stages of the time by the server's statistics."""

    task: str
    url: str
    load: Closed | Open
    measured: Measured
    stages: Stages

    @property
    def protocol(self) -> str:
        """grpc or http."""
        return self.url.partition(":")[0]

    @property
    def latency(self) -> list[float]:
        """Latencies in ms at `PERCENTILES`, NaN without answers."""
        return [1000 * value for value in self.measured.percentiles(*PERCENTILES)]

    def cells(self) -> list[str]:
        """Format the row of the table."""
        stages = [float(getattr(self.stages, stage)) for stage in STAGES]
        return [
            f"{self.task}, {self.protocol}, {self.load}",
            str(len(self.measured.latencies)),
            str(sum(self.measured.errors.values())),
            *(f"{value:.1f}" for value in (self.measured.throughput, *self.latency, *stages)),
        ]


def sender(client: AsyncClient, task: str, image: bytes) -> Send:
    """Return a function that sends a request of a task; texts differ each time."""

    async def send(number: int) -> object:
        if task == "classify":
            return await client.classify(image, label_set=LABEL_SET)
        if task == "segment":
            return await client.segment(image, label_set=LABEL_SET)
        if task == "embed_image":
            return await client.embed_images([image])
        text = f"a photo of {number} things"
        if task == "embed_text":
            return await client.embed_texts([text])
        return await client.search(text, index=INDEX)

    return send


@dataclass(frozen=True)
class Bench:
    """Measures rows of a server, whose statistics are at `http_url`, with a JPEG file; each has
    seconds of warm-up first.
    """

    image: bytes
    seconds: float
    warmup: float
    http_url: str

    def rows(
        self, urls: Sequence[str], tasks: Sequence[str], loads: Sequence[Closed | Open]
    ) -> list[Row]:
        """Measure a row for each task, server and load, in this order."""
        rows = []
        for task in tasks:
            for url in urls:
                for load in loads:
                    say(f"{task} at {url}, {load}")
                    rows.append(asyncio.run(self._row(url, task, load)))
        return rows

    async def _row(self, url: str, task: str, load: Closed | Open) -> Row:
        at_once = load.callers if isinstance(load, Closed) else load.at_most
        async with AsyncClient(url, timeout=60, concurrency=at_once) as client:
            send = sender(client, task, self.image)
            await send(0)  # shows errors of every request
            await measure(send, load, self.warmup)
            before = read_totals(self.http_url)
            measured = await measure(send, load, self.seconds)
            after = read_totals(self.http_url)
        spent = sum(measured.latencies)
        answered = max(1, len(measured.latencies))
        return Row(task, url, load, measured, Stages.between(task, before, after, spent, answered))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw latency against throughput, by task, with a line for each protocol and loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = 3
    down = math.ceil(len(TASKS) / across)
    figure, panels = pyplot.subplots(
        down, across, figsize=(5.0 * across, 4.0 * down), layout="constrained", squeeze=False
    )
    for task, axes in zip_longest(TASKS, panels.flat):
        if task is None:
            axes.set_axis_off()
        else:
            _draw_task(axes, task, [row for row in rows if row.task == task])
    with staged(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _draw_task(axes: Any, task: str, rows: Sequence[Row]) -> None:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.measured.latencies:
            loop = "open" if isinstance(row.load, Open) else "closed"
            lines.setdefault(f"{row.protocol}, {loop} loop", []).append(row)
    for number, (name, points) in enumerate(lines.items()):
        colour = f"C{number}"
        points.sort(key=lambda row: row.measured.throughput)
        rates = [row.measured.throughput for row in points]
        median = PERCENTILES.index(50)
        tail = PERCENTILES.index(99)
        medians = [row.latency[median] for row in points]
        axes.plot(rates, medians, "o-", color=colour, label=f"{name}: p50")
        axes.plot(rates, [row.latency[tail] for row in points], "x--", color=colour, label="p99")
        for row, rate, value in zip(points, rates, medians, strict=True):
            axes.annotate(
                str(row.load),
                (rate, value),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize="x-small",
            )
    axes.set(title=task, xlabel="answers per second", ylabel="latency, ms")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def worst(rows: Sequence[Row]) -> str:
    """Describe the worst p99, where its time goes, and the worst p99 for its median."""
    tail = PERCENTILES.index(99)
    middle = PERCENTILES.index(50)
    row = max(rows, key=lambda row: row.latency[tail] / row.latency[middle])
    longest = max(rows, key=lambda row: row.latency[tail])
    stages = {stage: float(getattr(longest.stages, stage)) for stage in STAGES}
    most = max(stages, key=stages.__getitem__)
    return (
        f"The worst p99 is that of {longest.task}, {longest.protocol}, {longest.load}:"
        f" {longest.latency[tail]:.0f} ms, {longest.latency[tail] / longest.latency[middle]:.1f}"
        f" times its median; its requests spend most of their time in {most}"
        f" ({stages[most]:.0f} ms of {sum(stages.values()):.0f} in the mean). The worst for its"
        f" median is that of {row.task}, {row.protocol}, {row.load}: {row.latency[tail]:.0f} ms,"
        f" {row.latency[tail] / row.latency[middle]:.1f} times."
    )


def overlapping_cells(row: Row) -> list[str]:
    """A row of the table of callers who overlap."""
    latencies = [1000 * value for value in row.measured.latencies]
    median = row.latency[PERCENTILES.index(50)]
    tail = row.latency[PERCENTILES.index(99)]
    figures = (row.measured.throughput, median, tail, max(latencies))
    return [
        f"{row.protocol}, {row.load}",
        str(len(latencies)),
        *(f"{value:.1f}" for value in figures),
        str(sum(latency > SLOW for latency in latencies)),
    ]


def open_rates(closed: Sequence[Row], shares: Sequence[float]) -> Mapping[str, list[Open]]:
    """List the open loops of each task, at shares of its best rate over gRPC in a closed loop."""
    rates = {}
    for task in TASKS:
        over_grpc = [row for row in closed if (row.task, row.protocol) == (task, "grpc")]
        best = max(row.measured.throughput for row in over_grpc)
        rates[task] = [Open(float(f"{share * best:.2g}")) for share in shares]
    return rates


def main(
    architecture: str = "ViT-B-32",
    precision: str = "int8",
    runtime: Literal["onnxruntime", "openvino"] = "openvino",
    concurrency: tuple[int, ...] = (1, 4, 16),
    overlapping: tuple[int, ...] = (1, 2, 4, 8, 16),
    overlapping_seconds: float = 10.0,
    shares: tuple[float, ...] = (0.5, 0.8, 1.1),
    seconds: float = 4.0,
    warmup: float = 1.0,
    images: int = 64,
    out: Path = RESULTS,
) -> None:
    """Measure every task under load.

    Args:
        architecture: open_clip architecture, with random weights and an adapter.
        precision: of the release.
        runtime: of the encoders; openvino computes int8 by fixed ranges, which the index's images
            give.
        concurrency: callers in a closed loop.
        overlapping: callers of short texts in a closed loop, whose slowest answers are counted.
        overlapping_seconds: of each of these rows.
        shares: rates of the open loop, as parts of the best rate over gRPC in a closed loop.
        seconds: of each row.
        warmup: seconds before each row.
        images: in the index.
        out: folder of the tables and the picture.
    """
    width = 640
    height = 480
    what = WHAT.replace("\n", " ").format(
        width=width,
        height=height,
        labels=len(LABELS),
        images=images,
        seconds=seconds,
        warmup=warmup,
    )
    title = f"Under load: {architecture} {precision} with {runtime}, every task"
    report = Report("load", title, what, timed=False)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures = folder / "pictures"
        pictures.mkdir()
        for number in range(images):
            (pictures / f"{number}.jpg").write_bytes(picture(width, height, seed=number))
        say("exporting")
        calibration = pictures if (runtime, precision) == ("openvino", "int8") else None
        with Process() as process:
            process.call(
                export, architecture, precision, folder, LABELS, "naclip", calibration, runtime
            )
        say("building the index")
        release = load_release(folder / "repository")
        build(str(pictures), folder / "indexes" / INDEX, release)
        say("starting the server")
        options: dict[str, Any] = {"indexes": folder / "indexes", "instances": ["2"]}
        repository = folder / "repository"
        server = TritonServer(ServerConfig(repository, Endpoints.on_free_ports(), **options))
        stack.enter_context(server)
        bench = Bench(picture(width, height), seconds, warmup, server.http_url)
        urls = [server.grpc_url, server.http_url]
        loads = [Closed(callers) for callers in overlapping]
        longer = replace(bench, seconds=overlapping_seconds)
        texts = longer.rows(urls, ["embed_text"], loads)
        closed = bench.rows(urls, TASKS, [Closed(callers) for callers in concurrency])
        opened = []
        for task, loads in open_rates(closed, shares).items():
            opened += bench.rows(urls[:1], [task], loads)
    report.table(
        "Short texts from callers who overlap",
        ["protocol, load", "answers", "per s", "p50", "p99", "slowest", f"above {SLOW:.0f} ms"],
        [overlapping_cells(row) for row in texts],
    )
    report.note(
        "A closed loop, in ms. What is above the limit waited for nothing but the work of others "
        "where p50 is near it; elsewhere it would be a stall of the server."
    )
    percentiles = [f"p{which}" for which in PERCENTILES]
    columns = ["task, protocol, load", "answers", "errors", "per s", *percentiles, *STAGES]
    report.table("Closed loop", columns, [row.cells() for row in closed])
    report.note(
        "Callers wait for their answer before they ask again. Times are in ms; the last four are"
        f" means. {worst(closed)}"
    )
    report.table("Open loop", columns, [row.cells() for row in opened])
    shown = ", ".join(f"{share:g}" for share in shares)
    report.note(
        "Requests come at random times, whether or not the server keeps up; latency counts from "
        f"when they were due. Rates are {shown} of the best rate of the closed loop over gRPC."
        f" At 1.1 of it a queue grows until the row ends. {worst(opened)}"
    )
    report.note("![Latency against answers per second, for each task](load.png)")
    report.write(out)
    draw([*closed, *opened], out / "load.png")


if __name__ == "__main__":
    tyro.cli(main)
