"""What it costs to follow requests by traces, and what a noisy key costs the others: `classify` of
a JPEG, answered by an engine.
"""

from __future__ import annotations

import base64
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import tyro
import urllib3
from common import CLASS_NAMES, RESULTS, Process, Report, alternate, picture, ratio, say
from engines import served
from gateway import export, timed
from serving import LABEL_SET, together

from radapter_client import Client
from radapter_serve.gateway.keys import new_key

# Each by the name of its key. The noisy one sends far more than it may.
LIMITS = {"calm": "", "noisy": "requests_per_second=0.5 at_once=1", "unlimited": ""}
NAMES = {
    "alone": "alone",
    "noisy": f"next to a key with {LIMITS['noisy']}",
    "unlimited": "next to a key without limits",
}


@dataclass(frozen=True)
class Way:
    """A server and a key.

    Attributes:
        server: that answers.
        key: that lets in.
    """

    server: Server
    key: str


@dataclass(frozen=True)
class Server:
    """An engine.

    Attributes:
        url: where it answers.
        process: of it.
    """

    url: str
    process: psutil.Process

    def cpu(self) -> float:
        """The seconds of processor time that it has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def engine(repository: Path, keys: Path, more: Mapping[str, str]) -> Iterator[Server]:
    """An engine in a process of its own, as radapter-serve starts it."""
    environment = {name: one for name, one in os.environ.items() if not name.startswith("OTEL_")}
    flags = ["--api-keys", str(keys)]
    with served("process", repository, flags, {**environment, **more}) as (url, process, _):
        yield Server(url, process)


def collect(told: Connection) -> None:
    """Take spans, in a process of its own, and say how many requests brought some."""
    taken = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            taken[0] += 1
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.send(server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.recv()
        told.send(taken[0])
        told.recv()  # until it is killed


@contextlib.contextmanager
def beside(target: Callable[[Connection], None]) -> Iterator[Connection]:
    """A function in a process of its own, and the way to it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs,))
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def flood(told: Connection) -> None:
    """Send requests, so many a second, whatever is answered, while asked to; then count answers."""
    pool = urllib3.PoolManager(maxsize=8, retries=False)
    while True:
        url, key, body, rate = told.recv()
        counts: Counter[int] = Counter()
        stop = threading.Event()
        threads = [
            threading.Thread(
                target=_send,
                args=(pool, url, key, body, 4 / rate, stop, counts),
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        told.recv()
        stop.set()
        for thread in threads:
            thread.join()
        told.send(dict(counts))


def _send(
    pool: urllib3.PoolManager,
    url: str,
    key: str,
    body: bytes,
    pause: float,
    stop: threading.Event,
    counts: Counter[int],
) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    while not stop.wait(pause):
        answer = pool.request("POST", f"{url}/v2/models/classify/infer", body=body, headers=headers)
        counts[answer.status] += 1


def asked(jpeg: bytes) -> bytes:
    """A request to `classify`, in JSON."""
    image = base64.b64encode(jpeg).decode()
    inputs = [
        {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [image]},
        {"name": "label_set", "shape": [1, 1], "datatype": "BYTES", "data": [LABEL_SET]},
    ]
    return json.dumps({"inputs": inputs}).encode()


def traces(report: Report, ways: Mapping[str, Way], calls: int, repeats: int) -> None:
    """Requests with traces and without."""
    jpeg = picture(640, 480)
    with contextlib.ExitStack() as stack:
        clients = {
            name: stack.enter_context(Client(way.server.url, api_key=way.key, timeout=60))
            for name, way in ways.items()
        }
        classify = {
            name: partial(client.classify, jpeg, label_set=LABEL_SET)
            for name, client in clients.items()
        }
        pool = stack.enter_context(ThreadPoolExecutor(8))
        kept: dict[str, list[float]] = {name: [] for name in ways}
        say("traces, one caller")
        single = alternate(
            {name: partial(timed, call, calls, kept[name]) for name, call in classify.items()},
            repeats,
        )
        say("traces, eight callers")
        cpu: dict[str, list[float]] = {name: [] for name in ways}

        def eight(name: str) -> float:
            before = ways[name].server.cpu()
            seconds = together(classify[name], 64, pool)
            cpu[name].append((ways[name].server.cpu() - before) / 64)
            return seconds

        many = alternate({name: partial(eight, name) for name in ways}, repeats)
    rows = [
        [
            name,
            f"{1e3 * statistics.median(single[name]):.1f}",
            f"{1 / ratio(single[name], single['off']):.3f}",
            f"{64 / statistics.median(many[name]):.1f}",
            f"{1 / ratio(many[name], many['off']):.3f}",
            f"{1e3 * statistics.median(cpu[name][1:]):.2f}",
            f"{ratio(cpu[name][1:], cpu['off'][1:]):.3f}",
        ]
        for name in ways
    ]
    columns = [
        "traces",
        "ms, one caller",
        "rate to off",
        "images/s, eight callers",
        "rate to off",
        "server's CPU ms an image",
        "to off",
    ]
    report.table("Traces", columns, rows)
    report.note(
        "Aim: a rate of at least 0.98 of that without. What else runs on the machine changes the"
        " rates by some per cent, and the processor time of the server's process by less."
    )


def noise(report: Report, keys: Mapping[str, Way], calls: int, repeats: int, rate: float) -> None:
    """A calm caller, alone and next to a noisy one."""
    jpeg = picture(640, 480)
    body = asked(jpeg)
    answers: dict[str, Counter[int]] = {"noisy": Counter(), "unlimited": Counter()}
    kept: dict[str, list[float]] = {name: [] for name in ("alone", *answers)}
    calm = keys["calm"]
    with Client(calm.server.url, api_key=calm.key) as client, beside(flood) as flooding:
        call = partial(client.classify, jpeg, label_set=LABEL_SET)

        def tail(name: str) -> float:
            own: list[float] = []
            timed(call, calls, own)
            kept[name] += own
            return p95(own)

        def next_to(name: str) -> float:
            way = keys[name]
            flooding.send((way.server.url, way.key, body, rate))
            time.sleep(0.3)
            found = tail(name)
            flooding.send("stop")
            answers[name].update(flooding.recv())
            return found

        say("a noisy key")
        candidates = {"alone": partial(tail, "alone")}
        tails = alternate(
            {**candidates, **{name: partial(next_to, name) for name in answers}}, repeats
        )
    rows = []
    for name, taken in kept.items():
        counts = answers.get(name, Counter())
        rows.append(
            [
                NAMES[name],
                f"{1e3 * statistics.median(taken[calls:]):.1f}",
                f"{1e3 * statistics.median(tails[name]):.1f}",
                f"{ratio(tails[name], tails['alone']):.2f}",
                f"{counts[200]}",
                f"{counts[429]}",
            ]
        )
    columns = ["a calm caller", "p50 ms", "p95 ms", "p95 to alone", "noise answered", "refused"]
    report.table(f"Noise of {rate:g} requests a second", columns, rows)
    report.note("Aim: next to a key with limits, a p95 of at most 1.10 of that alone.")


def p95(times: Sequence[float]) -> float:
    """The time that 95 % of the calls do not take longer than."""
    return statistics.quantiles(times, n=20)[-1]


def main(
    architecture: str = "ViT-B-32",
    precision: str = "int8",
    calls: int = 40,
    repeats: int = 8,
    rate: float = 50.0,
    repository: Path | None = None,
    out: Path = RESULTS,
) -> None:
    """Measure traces and noise.

    Args:
        architecture: open_clip architecture, with random weights and an adapter.
        precision: of the release.
        calls: calls of a candidate in a round.
        repeats: rounds.
        rate: requests a second that the noisy key sends.
        repository: a model repository with the label set of `benchmarks/gateway.py`, in place of a
            new one.
        out: folder of the table.
    """
    report = Report(
        "followed",
        f"Requests followed, and a noisy key: {architecture} {precision}",
        f"Classify, a JPEG of 640 x 480 pixels against a label set of {len(CLASS_NAMES)} labels, by"
        " `radapter-serve --engine process`. Callers, server and collector share the machine.",
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if repository is None:
            say("exporting")
            with Process() as process:
                process.call(export, architecture, precision, folder)
            repository = folder / "repository"
        keys = folder / "keys"
        known = {name: new_key(keys, name) for name in LIMITS}
        lines = keys.read_text(encoding="utf-8").splitlines()
        limited = [f"{line} {LIMITS[line.partition(':')[0]]}" for line in lines]
        keys.write_text("\n".join(limited) + "\n", encoding="utf-8")
        collector = stack.enter_context(beside(collect))
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.recv()}"}
        say("starting two engines")
        off = stack.enter_context(engine(repository, keys, {}))
        on = stack.enter_context(engine(repository, keys, endpoint))
        noise(report, {name: Way(off, key) for name, key in known.items()}, calls, repeats, rate)
        ways = {"off": Way(off, known["calm"]), "on": Way(on, known["calm"])}
        traces(report, ways, calls, repeats)
        collector.send("count")
        report.note(f"The collector took spans in {collector.recv()} requests.")
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
