"""Many mixed requests to one server, good and bad, by every way in: what the memory of its
processes does meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import urllib3
from common import RESULTS, Report, memory, say

from radapter_client import Client, RAdapterClientError
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.server.endpoints import free_ports
from tests.helpers.small_release import LABELS, TASKS, png, write_release

MIB = 2**20
SHARES = (
    0.01,
    0.1,
    0.5,
    1.0,
)  # of the requests, after which memory is read; the first is the warm-up
GRPC = "gRPC"
HTTP = "HTTP"
GATEWAY = "gateway"
IMAGES = [png(number, 40, 30) for number in range(4)]
TEXTS = ["a cat", "Ölkäfer", "a red thing"]

Ask = Callable[[Client], Any]

GOOD: dict[str, Ask] = {
    "embed_image": lambda client: client.embed_images(IMAGES[:2]),
    "embed_text": lambda client: client.embed_texts(TEXTS),
    "classify": lambda client: client.classify(IMAGES[0], LABELS).top,
    "classify, label set": lambda client: client.classify(IMAGES[1], label_set="colours").top,
    "segment": lambda client: np.asarray(client.segment(IMAGES[2], LABELS).mask),
    "retrieve": lambda client: [hit.id for hit in client.search("a cat", index="photos")],
    "retrieve by image": lambda client: [
        hit.id for hit in client.search(image=IMAGES[3], index="photos")
    ],
}
BAD: dict[str, Ask] = {
    "no image": lambda client: client.classify(b"no image at all", LABELS),
    "half an image": lambda client: client.embed_images([IMAGES[0][:200]]),
    "no such label set": lambda client: client.classify(IMAGES[0], label_set="none"),
    "no such index": lambda client: client.search("a cat", index="none"),
}


def write(folder: Path) -> None:
    """A repository with a tiny release, and an index that it made."""
    write_release(folder / "repository", 1, seed=1, tasks=(*TASKS, "retrieve"))
    (folder / "photos").mkdir()
    for number, data in enumerate(IMAGES):
        (folder / "photos" / f"{number}.png").write_bytes(data)
    build(
        str(folder / "photos"), folder / "indexes" / "photos", load_release(folder / "repository")
    )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[tuple[list[int], dict[str, str]]]:
    """radapter-serve and radapter-gateway; the numbers of their processes, and a URL for each way
    in.
    """
    http, grpc, metrics = free_ports()
    gateway = free_ports()[0]
    serve = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    serve += ["--indexes", str(folder / "indexes")]
    commands = [
        ["radapter_serve.cli.serve", str(folder / "repository"), *serve],
        ["radapter_serve.cli.gateway", "--port", str(gateway), "--server", f"127.0.0.1:{grpc}"],
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        processes = []
        for command in commands:
            process = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        deadline = time.monotonic() + 180
        while not _ready(f"http://127.0.0.1:{gateway}/health/ready"):
            if time.monotonic() > deadline or processes[0].poll() is not None:
                raise SystemExit(
                    "the server did not start:"
                    f" {(folder / 'log').read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.5)
        ways = {GRPC: f"grpc://127.0.0.1:{grpc}", HTTP: f"http://127.0.0.1:{http}"}
        yield (
            [process.pid for process in processes],
            {**ways, GATEWAY: f"http://127.0.0.1:{gateway}"},
        )


def _ready(url: str) -> bool:
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        return urllib3.request("GET", url, retries=False, timeout=10).status == 200
    return False


def resident(pid: int | str, field: str = "VmRSS") -> float:
    """MiB of memory of a process, now or at its peak (`VmHWM`)."""
    return memory(field, pid) / MIB


def shared(pid: int) -> float:
    """MiB that a process has mapped of files in /dev/shm, also of those whose names are gone."""
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "/dev/shm/" in line:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            total += last - first
    return total / MIB


def reading(parents: list[int]) -> dict[str, float]:
    """MiB of each process, and of /dev/shm, by what people call them."""
    found = pids(parents)
    sizes = {name: resident(pid) for name, pid in found.items()}
    return {
        "client (this script)": resident("self"),
        "/dev/shm": shared(found["tritonserver"]),
        **sizes,
    }


def pids(parents: list[int]) -> dict[str, int]:
    """The numbers of all processes, by what people call them."""
    found = dict(zip(("radapter-serve", "radapter-gateway"), parents, strict=True))
    for server in _children(parents[0]):
        found["tritonserver"] = server
        models: Counter[str] = Counter()
        for pid in _children(server):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if model := re.search(
                r"/([^/]+)/\d+/model\.py$", words[1].decode() if len(words) > 1 else ""
            ):
                models[model[1]] += 1
                found[f"{model[1]}, process {models[model[1]]}"] = pid
    return found


def _children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return sorted(int(pid) for task in tasks for pid in task.read_text().split())


class Load:
    """Callers that ask in turn, and compare each answer with the first one to the same request."""

    def __init__(self, ways: dict[str, str], requests: int, callers: int, seconds: float) -> None:
        self.sent = itertools.count()
        self.done = self.bad = 0
        self.wrong: list[str] = []
        self._requests = requests
        self._seconds = seconds
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._known: dict[str, Any] = {}
        self._ways = ways
        asks = [*GOOD.items()] * 3 + [*BAD.items()]
        self._asks = list(itertools.product(asks, ways))
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(callers)]

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        if not any(thread.is_alive() for thread in self.threads):
            return 1.0
        return max(self.done / self._requests, (time.monotonic() - self._began) / self._seconds)

    @property
    def rate(self) -> float:
        """Requests a second until now."""
        return self.done / (time.monotonic() - self._began)

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            clients = {way: stack.enter_context(Client(url)) for way, url in self._ways.items()}
            while (number := next(self.sent)) < self._requests and self.share < 1:
                (name, ask), way = self._asks[number % len(self._asks)]
                answer = self._answer(partial(ask, clients[way]))
                with self._lock:
                    self.done += 1
                    self.bad += name in BAD
                    if not same(self._known.setdefault(name, answer), answer):
                        self.wrong.append(f"{name} over {way}: {answer!r}"[:300])

    @staticmethod
    def _answer(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RAdapterClientError as error:
            return f"{type(error).__name__} {error.code}"
        except Exception as error:  # no caller should ever see one
            return f"{type(error).__name__}: {error}"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.allclose(one, other, atol=1e-5))
    return type(one) is type(other) and bool(one == other)


def main(
    requests: int = 100_000, callers: int = 4, minutes: float = 24 * 60, out: Path = RESULTS
) -> None:
    """Send them, and write the memory of every process after 1, 10, 50 and 100 % of them.

    Args:
        requests: to send in all.
        callers: at once.
        minutes: after which no more is sent; the shares are then those of the time.
        out: folder of the results.
    """
    what = (
        f"Requests by {callers} callers at once, of every task in turn, over gRPC, HTTP and the"
        " gateway; four of 25 are bad. Real tritonserver, gateway and task models, two processes a"
        " task; the encoders are tiny. Every answer is compared with the first one to the same"
        " request."
    )
    report = Report("soak", "Soak: memory over many requests", what, timed=False)
    readings: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        say("starting the server and the gateway")
        with running(folder) as (parents, ways):
            load = Load(ways, requests, callers, 60 * minutes)
            for thread in load.threads:
                thread.start()
            for share in SHARES:
                while load.share < share:
                    time.sleep(0.1)
                readings.append(reading(parents))
                say(
                    f"{share:.0%}: {load.done:,} requests, {load.rate:.0f} a second,"
                    f" {len(load.wrong)} wrong"
                )
                table(report, readings)
            for thread in load.threads:
                thread.join()
            rate = load.rate
    report.note(
        f"{load.done:,} answers, {load.bad:,} of them to bad requests: {len(load.wrong)} were not"
        f" what was expected. {rate:.0f} requests a second."
    )
    for line in load.wrong[:5]:
        report.note(f"- {line}")
    report.write(out)


def table(report: Report, readings: list[dict[str, float]]) -> None:
    """MiB by process and share; what a process had where it runs no more is a dash."""
    names = sorted(set().union(*readings), key=lambda name: (", process" in name, name))
    rows = []
    for name in names:
        cells = [f"{reading[name]:.1f}" if name in reading else "-" for reading in readings]
        growth = (
            f"{readings[-1][name] - readings[1][name]:+.1f}"
            if len(readings) == len(SHARES)
            else "-"
        )
        rows.append([name, *cells, *["-"] * (len(SHARES) - len(readings)), growth])
    report.table(
        "MiB of memory", ["process", *(f"{share:.0%}" for share in SHARES), "10 % to 100 %"], rows
    )


if __name__ == "__main__":
    tyro.cli(main)
