"""Every task of a server under load: closed loop with more and more callers, open loop at several rates."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from common import RESULTS, Process, Report, say
from gateway import export
from serving import LABEL_SET

from radapter_serve.bench.report import PERCENTILES, STAGES, Row, draw
from radapter_serve.bench.requests import LABELS, TASKS, picture
from radapter_serve.cli.bench import bench
from radapter_serve.index.build import build
from radapter_serve.runtimes.local_release import LocalRelease
from radapter_serve.server.triton_server import TritonServer, free_ports

INDEX = "pictures"
WHAT = """`radapter-bench` on a server as radapter-serve starts it. Client and server share the machine. Images are JPEG
files of {width} x {height} pixels; classify and segment have a label set of {labels} labels, retrieve an index of
{images} images; every text is another one. Each row was measured for {seconds:g} s, after {warmup:g} s that do not
count."""


def measured(out: Path, **options: Any) -> list[Row]:
    """The rows of one `radapter-bench`."""
    bench(out=out, label_set=LABEL_SET, index=INDEX, **options)
    found = json.loads((out / "bench.json").read_text(encoding="utf-8"))["rows"]
    rows = [
        Row(**{**row, "latency": {k: math.nan if v is None else v for k, v in row["latency"].items()}}) for row in found
    ]
    return sorted(rows, key=lambda row: (row.task, row.protocol))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows of a table."""
    return [
        [
            f"{row.task}, {row.protocol}, {row.load}",
            str(row.requests),
            str(sum(row.errors.values())),
            *(f"{value:.1f}" for value in (row.throughput, *row.latency.values(), *(row.stages or {}).values())),
        ]
        for row in rows
    ]


def main(
    architecture: str = "ViT-B-32",
    precision: str = "int8",
    concurrency: tuple[int, ...] = (1, 4, 16),
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
        concurrency: callers in a closed loop.
        shares: rates of the open loop, as parts of the most answers a second over gRPC in a closed loop.
        seconds: of each row.
        warmup: seconds before each row.
        images: in the index.
        out: folder of the tables and the picture.
    """
    size = width, height = 640, 480
    values = {"labels": len(LABELS), "images": images, "seconds": seconds, "warmup": warmup}
    what = WHAT.format(width=width, height=height, **values).replace("\n", " ")
    report = Report("load", f"Under load: {architecture} {precision}, every task", what, timed=False)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("exporting")
        with Process() as process:
            process.call(export, architecture, precision, folder, LABELS, "naclip")
        say("building the index")
        (folder / "pictures").mkdir()
        for number in range(images):
            (folder / "pictures" / f"{number}.jpg").write_bytes(picture(*size, seed=number))
        build(str(folder / "pictures"), folder / "indexes" / INDEX, LocalRelease(folder / "repository"))
        say("starting the server")
        options: dict[str, Any] = {"indexes": folder / "indexes", "instances": ["2"]}  # as radapter-serve's
        server = stack.enter_context(TritonServer(folder / "repository", "127.0.0.1", *free_ports(), **options))
        same: dict[str, Any] = {"seconds": seconds, "warmup": warmup}
        urls = server.grpc_url, server.http_url
        closed = measured(folder / "closed", url=urls, tasks=TASKS, concurrency=concurrency, **same)
        opened = []
        for task in TASKS:
            most = max(row.throughput for row in closed if (row.task, row.protocol) == (task, "grpc"))
            rates = tuple(float(f"{share * most:.2g}") for share in shares)
            opened += measured(folder / task, url=urls[:1], tasks=[task], rate=rates, **same)
    columns = ["task, protocol, load", "answers", "errors", "per s", *(f"p{which}" for which in PERCENTILES), *STAGES]
    report.table("Closed loop", columns, cells(closed))
    report.note("Callers wait for their answer before they ask again. Times are in ms; the last four are means.")
    report.table("Open loop", columns, cells(opened))
    report.note(
        "Requests come at random times, whether or not the server keeps up; latency counts from when they were due. "
        f"Rates are {', '.join(f'{share:g}' for share in shares)} of the most that the closed loop reached over gRPC."
    )
    report.note("![Latency against answers a second, for each task](load.png)")
    report.write(out)
    draw([*closed, *opened], out / "load.png")


if __name__ == "__main__":
    tyro.cli(main)
