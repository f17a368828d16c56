"""Fixtures of the faults: a real server with stand-in models, and a gateway in a process of its
own.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from radapter_client import RAdapterClientError
from radapter_serve.gateway.run import start
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.endpoints import free_ports
from tests.helpers.fake_server import FakeServer, write_repository
from tests.helpers.served import repository

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


class RunningGateway:
    """A gateway in a process of its own that can be killed, frozen and started again at the same
    port.
    """

    def __init__(self, server: str, **options: Any) -> None:
        self._settings = Settings(port=free_ports()[0], server=server, **options)
        self.port = self._settings.port
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is alive."""
        self._process: subprocess.Popen[bytes] = start(self._settings)
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
