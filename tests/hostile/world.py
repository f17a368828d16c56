"""A gateway with keys in front of a tritonserver with a tiny release, and a client that nothing may
disturb.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from radapter_serve.encoders.loaded import load_release
from radapter_serve.gateway.run import start
from radapter_serve.gateway.settings import Settings
from radapter_serve.index.build import build
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.processes import children
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.small_release import TASKS, png, write_release
from tests.hostile.asks import INDEX, KEY, good, message
from tests.hostile.case import Case
from tests.hostile.judge import wrong
from tests.hostile.wire import Answer, exchange

TIMEOUT = 20.0  # seconds that the gateway gives a request


@dataclass
class World:
    """What runs.

    Attributes:
        server: tritonserver.
        gateway: the gateway's process.
        address: where it listens.
    """

    server: TritonServer
    gateway: Popen[bytes]
    address: tuple[str, int]

    @property
    def triton(self) -> tuple[str, int]:
        """Triton's own HTTP port."""
        return self.server.endpoints.host, self.server.endpoints.http_port

    def warm_up(self) -> None:
        """Search once, for the first search loads its libraries."""
        exchange(self.triton, Case("first", (good()["retrieve"].raw(),)), 120)

    def processes(self) -> set[int]:
        """The numbers of all processes: gateway, tritonserver, and those of its models."""
        own = self.server.pid
        assert own is not None
        living = {pid for pid, process in children(own).items() if process.state != "Z"}
        return living | {own} | ({self.gateway.pid} if self.gateway.poll() is None else set())

    def gateway_files(self) -> int:
        """How many files and connections the gateway has open, once their number stays the same."""
        return open_files(self.gateway.pid)

    def memory(self) -> dict[str, int]:
        """MiB that the gateway, tritonserver and the largest of the models' processes had at
        most.
        """
        own = self.server.pid
        assert own is not None
        models = max((_peak(pid) for pid in self.processes() - {own, self.gateway.pid}), default=0)
        return {
            "gateway": _peak(self.gateway.pid),
            "tritonserver": _peak(own),
            "a model's process": models,
        }


def open_files(pid: int) -> int:
    """How many files and connections a process has open, once none has ended for 2 seconds; those
    without a request end by themselves after 10.
    """
    folder = Path(f"/proc/{pid}/fd")
    found = len(list(folder.iterdir()))
    since = time.monotonic()
    while time.monotonic() - since < 2:
        time.sleep(0.1)
        now = len(list(folder.iterdir()))
        if now < found:
            found = now
            since = time.monotonic()
    return found


def rss(pid: int, name: str = "VmRSS") -> int:
    """MiB of a process now, or what else its status calls so."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(name)), 0)


def _peak(pid: int) -> int:
    return rss(pid, "VmHWM")


def prepare(folder: Path) -> tuple[Path, Path, Path]:
    """Make a model repository with a tiny release, a folder with its index, and a file of keys."""
    repository = folder / "models"
    indexes = folder / "indexes"
    keys = folder / "keys"
    write_release(repository, 1, seed=1, tasks=(*TASKS, "retrieve"))
    photos = folder / "photos"
    photos.mkdir()
    for number in range(6):
        (photos / f"{number}.png").write_bytes(png(number, 50, 40))
    build(str(photos), indexes / INDEX, load_release(repository))
    keys.write_text(f"suite: {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    return repository, indexes, keys


@contextmanager
def engine(folder: Path) -> Iterator[tuple[tuple[str, int], Popen[bytes]]]:
    """The same release in one process, without Triton: where it listens, and the process.

    Args:
        folder: an empty one, as of `world`.
    """
    port = free_ports()[0]
    command = [sys.executable, "-m", "tests.helpers.engine_process", *map(str, prepare(folder))]
    process = Popen([*command, str(port), str(TIMEOUT)], cwd=Path(__file__).parents[2])
    ready = Case("ready", (message("GET", "/v2/health/ready", {}),))
    try:
        deadline = time.monotonic() + 60
        while not any(one.status == 200 for one in exchange(("127.0.0.1", port), ready).answers):
            assert time.monotonic() < deadline and process.poll() is None, "it does not start"
            time.sleep(0.1)
        yield ("127.0.0.1", port), process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Everything started, and stopped again.

    Args:
        folder: an empty one, for the release, the index and the file of keys.
    """
    repository, indexes, keys = prepare(folder)
    with TritonServer(
        ServerConfig(repository, Endpoints.on_free_ports(), indexes=indexes)
    ) as server:
        port = free_ports()[0]
        settings = Settings(
            port=port,
            server=server.grpc_url.removeprefix("grpc://"),
            api_keys=keys,
            timeout=TIMEOUT,
        )
        gateway = start(settings)
        try:
            running = World(server, gateway, ("127.0.0.1", port))
            _wait(running)
            yield running
        finally:
            gateway.terminate()
            gateway.wait(30)


def _wait(running: World) -> None:
    ready = Case("ready", (message("GET", "/v2/health/ready", {}),))
    deadline = time.monotonic() + 60
    running.warm_up()
    while not any(answer.status == 200 for answer in exchange(running.address, ready).answers):
        assert time.monotonic() < deadline and running.gateway.poll() is None, (
            "the gateway does not start"
        )
        time.sleep(0.1)


def answers(address: tuple[str, int]) -> dict[str, Answer | None]:
    """What each task answers to the good client's request; None where there is no answer."""
    found = {}
    for task, asked in good().items():
        outcome = exchange(address, Case("good", (asked.raw(),)))
        found[task] = outcome.answers[0] if outcome.answers else None
    return found


@dataclass
class Good:
    """A client that asks every task the same, again and again, and compares the answers with the
    first.

    Attributes:
        asked: how many answers it has compared.
        troubles: those that differed.
        slowest: seconds of the slowest answer.
    """

    address: tuple[str, int]
    asked: int = 0
    troubles: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __enter__(self) -> Good:
        self._first = answers(self.address)
        self._stop = threading.Event()
        for task, answer in self._first.items():
            assert answer is not None and answer.status == 200 and wrong(answer) is None, (
                f"{task}: {answer}"
            )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.compare()

    def compare(self) -> None:
        """Ask once more, and compare."""
        start = time.monotonic()
        for task, answer in answers(self.address).items():
            self.asked += 1
            if answer is None or (answer.status, answer.body) != (200, self._bytes(task)):
                self.troubles.append(f"{task}: {answer and (answer.status, answer.body[:300])}")
        self.slowest = max(self.slowest, time.monotonic() - start)

    def _bytes(self, task: str) -> bytes:
        first = self._first[task]
        return first.body if first else b""

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.compare()
