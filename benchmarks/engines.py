"""The engines of radapter-serve side by side: Triton, and one process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from common import LABEL_SET, RESULTS, Process, Report, export, picture, say
from loop import Closed, Measured, Send, measure

from radapter_client import AsyncClient
from radapter_serve.server.config import free_ports

ENGINES = ("triton", "process")
TASKS = ("classify", "embed_text")
MIB = 2**20
WHAT = """`radapter-serve --engine triton` and `--engine process`, with their defaults otherwise,
asked over HTTP with our own client on the same machine. Images are JPEG files of 640 x 480
pixels, against a label set of 100 labels; every text is another one. Each row was measured for
{seconds:g} s, after {warmup:g} s that do not count; the engines take turns, and one runs at a
time."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A task of an engine with a number of callers."""

    engine: str
    task: str
    callers: int
    measured: Measured

    def cells(self) -> list[str]:
        """Format the row of the table."""
        p50, p99 = (1000 * value for value in self.measured.percentiles(50, 99))
        slowest = 1000 * max(self.measured.latencies)
        figures = (self.measured.throughput, p50, p99, slowest)
        return [
            f"{self.task}, {self.callers} callers, {self.engine}",
            *(f"{value:.1f}" for value in figures),
            str(sum(self.measured.errors.values())),
        ]


def worst(cells: Sequence[Cell], engine: str) -> str:
    """Describe the least and the largest throughput against Triton's."""
    rates = {(cell.engine, cell.task, cell.callers): cell.measured.throughput for cell in cells}
    ratios = {
        (task, callers): rates[engine, task, callers] / rate
        for (other, task, callers), rate in rates.items()
        if other == "triton"
    }
    (task, callers), least = min(ratios.items(), key=lambda item: item[1])
    (other, count), most = max(ratios.items(), key=lambda item: item[1])
    return (
        f"Of Triton's answers per second, {engine} has {least:.2f} at worst ({task}, {callers}"
        f" callers), and {most:.2f} at best ({other}, {count} callers)."
    )


def slowest(cells: Sequence[Cell]) -> str:
    """Describe the worst p99."""
    tails = {cell: 1000 * cell.measured.percentiles(99)[0] for cell in cells}
    last = max(cells, key=lambda cell: tails[cell])
    return (
        f"The worst p99 is {tails[last]:.0f} ms: {last.task}, {last.callers} callers,"
        f" {last.engine}; so many callers wait for each other."
    )


@contextlib.contextmanager
def served(
    engine: str,
    repository: Path,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, psutil.Process, float]]:
    """Start a server by its command; yield its URL, its process, and the seconds of its start."""
    http, grpc, metrics = free_ports()
    command = [sys.executable, "-m", "radapter_serve.cli.serve", str(repository)]
    command += ["--engine", engine, "--http-port", str(http), *flags]
    if engine == "triton":
        command += ["--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    ready = "v2/health/ready"
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{http}/{ready}", timeout=5).close()
                break
            if process.poll() is not None:
                raise SystemExit((process.stderr.read() if process.stderr else b"").decode())
            time.sleep(0.02)
        yield f"http://127.0.0.1:{http}", psutil.Process(process.pid), time.perf_counter() - begun
    finally:
        process.terminate()
        process.communicate()


def proportional(process: psutil.Process) -> int:
    """Sum the PSS of a process and its children, in bytes: shared memory counts once."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += int(member.memory_full_info().pss)
    return total


async def ask(
    url: str, task: str, image: bytes, callers: int, seconds: float, warmup: float
) -> Measured:
    """Measure a closed loop of a task."""
    async with AsyncClient(url, batch_size=1, concurrency=callers, retries=0) as client:
        sends: dict[str, Send] = {
            "classify": lambda _: client.classify(image, label_set=LABEL_SET),
            "embed_image": lambda _: client.embed_images([image]),
            "embed_text": lambda number: client.embed_texts([f"a photo of thing {number}"]),
        }
        await measure(sends[task], Closed(callers), warmup)
        return await measure(sends[task], Closed(callers), seconds)


def main(
    architecture: str = "ViT-B-32",
    precision: str = "int8",
    callers: tuple[int, ...] = (1, 8, 64),
    seconds: float = 6.0,
    warmup: float = 1.5,
    repository: Path | None = None,
    out: Path = RESULTS,
) -> None:
    """Measure the engines.

    Args:
        architecture: open_clip architecture, with random weights and an adapter.
        precision: of the release.
        repository: a model repository whose release has the label set `names`; one is exported if
            none is given.
        callers: at once.
        seconds: of each row.
        warmup: seconds before each row.
        out: folder of the tables.
    """
    what = WHAT.replace("\n", " ").format(seconds=seconds, warmup=warmup)
    title = f"Engines: {architecture} {precision} with Triton and without it"
    report = Report("engines", title, what, timed=False)
    cells: list[Cell] = []
    # Seconds until an engine is ready, and bytes (PSS) of its processes then and after the load.
    footprints: dict[str, tuple[float, int, int]] = {}
    image = picture(640, 480, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "repository" if repository is None else repository
        if repository is None:
            say("exporting")
            with Process() as process:
                process.call(export, architecture, precision, Path(folder))
        for engine in ENGINES:
            say(f"starting {engine}")
            with served(engine, models) as (url, server, start):
                idle = proportional(server)
                for task in TASKS:
                    for count in callers:
                        say(f"{engine}: {task}, {count} callers")
                        measured = asyncio.run(ask(url, task, image, count, seconds, warmup))
                        cells.append(Cell(engine, task, count, measured))
                footprints[engine] = start, idle, proportional(server)
    cells.sort(key=lambda cell: (TASKS.index(cell.task), cell.callers))
    report.table(
        "Answers",
        ["task, load, engine", "per s", "p50 ms", "p99 ms", "slowest ms", "errors"],
        [cell.cells() for cell in cells],
    )
    for engine in ENGINES[1:]:
        report.note(worst(cells, engine))
    report.note(slowest(cells))
    report.table(
        "What an engine takes",
        ["engine", "start s", "idle MiB", "after load MiB"],
        [
            [engine, f"{start:.1f}", f"{idle / MIB:.0f}", f"{loaded / MIB:.0f}"]
            for engine, (start, idle, loaded) in footprints.items()
        ],
    )
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
