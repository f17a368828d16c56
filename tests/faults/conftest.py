"""Fixtures of the faults: a real server with stand-in models, and a gateway in a process of its
own.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import urllib3

from radapter_client import RAdapterClientError
from radapter_serve.gateway.run import start
from radapter_serve.gateway.settings import Settings
from radapter_serve.release.release import TASKS
from radapter_serve.release.served import Served
from radapter_serve.server.endpoints import free_ports
from tests.helpers.fake_server import FakeServer, write_repository
from tests.helpers.served import repository
from tests.helpers.shared import shared
from tests.helpers.small_release import seal, write_release

__all__ = ["repository"]


def until(found: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something is so, and fail if it is not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def outcome(call: Callable[[], Any]) -> str:
    """The exception of a call of a client and its code, or "an answer"."""
    try:
        call()
    except RAdapterClientError as error:
        return f"{type(error).__name__} {error.code}"
    return "an answer"


class RunningProcess(ABC):
    """What answers over HTTP in a process of its own that can be killed, frozen and started again
    at the same port.

    Attributes:
        elsewhere: URLs of other ways in that must not notice what becomes of this one.
    """

    elsewhere: Sequence[str] = ()

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    @abstractmethod
    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process."""

    def start(self) -> None:
        """Start it, and wait until it is alive."""
        self._process = self.launch()
        until(self._alive, 60)

    def _alive(self) -> bool:
        assert self._process.poll() is None
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return (
                urllib3.request("GET", f"{self.url}/health/live", retries=False, timeout=5).status
                == 200
            )
        return False

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        """Kill it, whatever state it is in."""
        self._process.kill()
        self._process.wait()


class RunningGateway(RunningProcess):
    """A gateway in front of a Triton with the stand-in models."""

    def __init__(self, server: str, **options: Any) -> None:
        self._settings = Settings(port=free_ports()[0], server=server, **options)
        self.elsewhere = [f"grpc://{server}"]
        super().__init__(self._settings.port)

    def launch(self) -> subprocess.Popen[bytes]:
        return start(self._settings)


class RunningEngine(RunningProcess):
    """An engine with the gateway's app in front of it, whose `classify` obeys as the stand-in
    models do.
    """

    def __init__(self, repository: Path, *extra: str) -> None:
        self._repository = repository
        self._extra = extra
        super().__init__(free_ports()[0])

    def launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.helpers.engine_process", str(self._repository)]
        command += [str(self._repository / "indexes"), "-", str(self.port), "60", *self._extra]
        return subprocess.Popen(command, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the stand-in models, in one release, which no test changes."""
    return write_repository(tmp_path_factory.mktemp("faults") / "model_repository", [2])


@pytest.fixture(scope="session")
def running(stand_ins: Path) -> Iterator[FakeServer]:
    with FakeServer(stand_ins, instances=["2"], drain_seconds=5) as server:
        yield server


@pytest.fixture
def gateway(running: FakeServer) -> Iterator[RunningGateway]:
    gateway = RunningGateway(running.grpc_url.removeprefix("grpc://"))
    yield gateway
    gateway.end()


@pytest.fixture(scope="session")
def models(common: Path) -> Path:
    """Two sealed releases, of which the second is served."""

    def make(folder: Path) -> None:
        for number in (1, 2):
            write_release(folder, number, seed=number, tasks=TASKS)
        seal(folder, 1, 2)
        Served((2,)).save(folder)

    return shared(common, "sealed-releases", make)


@pytest.fixture
def engine(models: Path) -> Iterator[RunningEngine]:
    engine = RunningEngine(models, "orders")
    yield engine
    engine.end()


@pytest.fixture(params=["gateway", "engine"])
def front(request: pytest.FixtureRequest) -> RunningProcess:
    """What strangers ask: a gateway in front of Triton, or an engine."""
    found: RunningProcess = request.getfixturevalue(request.param)
    return found
