"""Fixtures of the faults: a real server with stand-in models, and what strangers ask."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import urllib3

from radapter_client import Client, RAdapterClientError
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.config import free_ports
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import tritonserver
from tests.helpers.fake_server import write_repository
from tests.helpers.fake_upstream import until
from tests.helpers.gateway import start

__all__ = ["until"]


def outcome(call: Callable[[], Any]) -> str:
    """The exception of a call of a client and its code, or "an answer"."""
    try:
        call()
    except RAdapterClientError as error:
        return f"{type(error).__name__} {error.code}"
    return "an answer"


def ask(client: Client, image: bytes = b"x", **options: Any) -> str:
    """The outcome of `classify` with an image, which may be an order of fake_model.py."""
    return outcome(lambda: client.classify(image, ["a"], **options))


class RunningProcess:
    """A process that answers over HTTP, and can be frozen, killed and started again at its port."""

    def __init__(self, port: int, launch: Callable[[], Popen[bytes]]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._launch = launch
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is alive."""
        self._process = self._launch()

        def is_alive() -> bool:
            assert self._process.poll() is None
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                path = f"{self.url}/health/live"
                return urllib3.request("GET", path, retries=False, timeout=5).status == 200
            return False

        until(is_alive, 60)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        """Kill it, whatever state it is in."""
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the stand-in models, in one release, which no test changes."""
    return write_repository(tmp_path_factory.mktemp("faults") / "model_repository", [2])


@pytest.fixture(scope="session")
def running(stand_ins: Path) -> Iterator[TritonServer]:
    with tritonserver(stand_ins, instances=["2"], drain_seconds=5) as server:
        yield server


@pytest.fixture
def gateway(running: TritonServer) -> Iterator[RunningProcess]:
    """A gateway in front of a Triton with the stand-in models."""
    server = running.grpc_url.removeprefix("grpc://")
    settings = Settings(port=free_ports()[0], server=server)
    process = RunningProcess(settings.port, lambda: start(settings))
    yield process
    process.end()


@pytest.fixture
def engine(releases: Path) -> Iterator[RunningProcess]:
    """An engine behind the gateway's app, whose `classify` obeys as the stand-in models do."""
    port = free_ports()[0]
    arguments = [releases, releases / "indexes", "-", port, 60, "orders"]
    command = [sys.executable, "-m", "tests.helpers.engine_process", *map(str, arguments)]
    process = RunningProcess(port, lambda: Popen(command, cwd=Path(__file__).parents[2]))
    yield process
    process.end()


@pytest.fixture(params=["gateway", "engine"])
def front(request: pytest.FixtureRequest) -> RunningProcess:
    """The process that strangers ask: a gateway in front of Triton, or an engine."""
    running: RunningProcess = request.getfixturevalue(request.param)
    return running
