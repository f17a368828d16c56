"""Through the gateway against the server itself: `classify` of a JPEG, one caller and several."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tyro
import urllib3
from common import (
    CLASS_NAMES,
    RESULTS,
    Process,
    Report,
    alternate,
    picture,
    random_clip,
    ratio,
    say,
)

from radapter_client import Client
from radapter_serve.gateway.run import start
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.triton_server import TritonServer

LABEL_SET = "names"  # of the releases of these benchmarks


def export(
    architecture: str,
    precision: str,
    folder: Path,
    labels: Sequence[str] = CLASS_NAMES,
    dense: str = "none",
    calibration: Path | None = None,
    runtime: str = "onnxruntime",
) -> None:
    """What radapter-export does, with a label set."""
    from radapter_export import ExportSettings, export_release  # only in the process that exports

    _, adapter, _ = random_clip(architecture, folder)
    names = folder / "names.txt"
    names.write_text("\n".join(labels), encoding="utf-8")
    settings = ExportSettings(
        merged=folder / "merged",
        model_repository=folder / "repository",
        label_sets={LABEL_SET: names},
        precision=precision,
        dense=dense,
        calibration=None if calibration is None else str(calibration),
        runtime=runtime,
        validation="none",  # random weights know no image
    )
    export_release(adapter, [0.5], settings)


@contextlib.contextmanager
def gateway(server: TritonServer) -> Iterator[str]:
    """A gateway in a process of its own, as radapter-gateway is; its URL."""
    port, *_ = free_ports()
    process = start(Settings(port=port, server=server.grpc_url.removeprefix("grpc://")))
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                if urllib3.request("GET", f"{url}/health/ready", retries=False).status == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def timed(call: Callable[[], object], count: int, calls: list[float]) -> float:
    """The median of `count` calls, one after another, which are kept in `calls`."""
    own = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        own.append(time.perf_counter() - begin)
    calls += own
    return statistics.median(own)


def together(call: Callable[[], object], count: int, pool: ThreadPoolExecutor) -> float:
    """Seconds for `count` calls by the threads of a pool."""
    start = time.perf_counter()
    for future in [pool.submit(call) for _ in range(count)]:
        future.result()
    return time.perf_counter() - start


def main(
    architecture: str = "ViT-B-32",
    precision: str = "int8",
    calls: int = 40,
    repeats: int = 10,
    concurrency: int = 8,
    out: Path = RESULTS,
) -> None:
    """Measure classify through the gateway and directly.

    Args:
        architecture: open_clip architecture, with random weights and an adapter.
        precision: of the release.
        calls: calls of each candidate in a round at concurrency 1; at more, `concurrency` times 8
            images.
        repeats: rounds.
        concurrency: callers at once.
        out: folder of the table.
    """
    report = Report(
        "gateway",
        f"The gateway: {architecture} {precision}, through it and directly",
        f"Classify, a JPEG of 640 x 480 pixels against a label set of {len(CLASS_NAMES)} labels."
        " Client, gateway and server share the machine and take turns.",
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("exporting")
        with Process() as process:
            process.call(export, architecture, precision, folder)
        say("starting the server and the gateway")
        options: dict[str, Any] = {
            "indexes": folder / "indexes",
            "instances": ["2"],
        }  # as radapter-serve's
        server = stack.enter_context(
            TritonServer(ServerConfig(folder / "repository", Endpoints.on_free_ports(), **options))
        )
        urls = {
            "HTTP": server.http_url,
            "gRPC": server.grpc_url,
            "gateway": stack.enter_context(gateway(server)),
        }
        clients = {name: stack.enter_context(Client(url)) for name, url in urls.items()}
        jpeg = picture(640, 480)
        ask = {
            name: partial(client.classify, jpeg, label_set=LABEL_SET)
            for name, client in clients.items()
        }
        answers = [call() for call in ask.values()]
        assert all(answer == answers[0] for answer in answers)

        say(f"concurrency 1: {repeats} rounds and a warm-up of {len(ask)} x {calls} calls")
        kept: dict[str, list[float]] = {name: [] for name in ask}
        times = alternate(
            {name: partial(timed, call, calls, kept[name]) for name, call in ask.items()}, repeats
        )
        rows = []
        for name in ask:
            cuts = statistics.quantiles(kept[name][calls:], n=100)
            more = statistics.median(a - b for a, b in zip(times[name], times["HTTP"], strict=True))
            rows.append(
                [
                    name,
                    *(f"{1e3 * cuts[share - 1]:.1f}" for share in (50, 95, 99)),
                    f"{1e3 * more:+.1f}",
                ]
            )
        report.table("Concurrency 1", ["way", "p50 ms", "p95 ms", "p99 ms", "more ms"], rows)
        report.note("More: than HTTP, at the median. Aim: at most 3 ms.")

        images = 8 * concurrency
        pool = stack.enter_context(ThreadPoolExecutor(concurrency))
        many = {name: partial(together, call, images, pool) for name, call in ask.items()}
        say(
            f"concurrency {concurrency}: {repeats} rounds and a warm-up of {len(many)} x {images}"
            " images"
        )
        times = alternate(many, repeats)
    rows = [
        [
            name,
            f"{images / statistics.median(times[name]):.1f}",
            f"{1 / ratio(times[name], times['HTTP']):.2f}",
        ]
        for name in many
    ]
    report.table(f"Concurrency {concurrency}", ["way", "images/s", "ratio"], rows)
    report.note("Ratio: to HTTP. Aim: at least 0.9.")
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
