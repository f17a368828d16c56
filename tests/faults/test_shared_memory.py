"""A small /dev/shm, as containers have it, in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from radapter_client import Client
from radapter_serve.server.endpoints import free_ports
from tests.faults.conftest import ask, until

pytestmark = pytest.mark.triton

HOLD = 'mount -t tmpfs -o size=$0 tmpfs /dev/shm && exec "$@"'


class Served:
    """`radapter-serve` with a /dev/shm of this size."""

    def __init__(self, size: str, repository: Path, log: Path) -> None:
        http, grpc, metrics = free_ports()
        self.urls = [f"grpc://127.0.0.1:{grpc}", f"http://127.0.0.1:{http}"]
        self._log = log
        command = [sys.executable, "-m", "radapter_serve.cli.serve", str(repository)]
        command += ["--http-port", str(http), "--grpc-port", str(grpc)]
        command += ["--metrics-port", str(metrics)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", HOLD, size, *command], stdout=file, stderr=file
            )

    @property
    def output(self) -> str:
        return " ".join(self._log.read_text(errors="replace").split())


@contextlib.contextmanager
def serve(size: str, repository: Path, log: Path) -> Iterator[Served]:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here, which takes root")
    served = Served(size, repository, log)
    try:
        yield served
    finally:
        served.process.send_signal(signal.SIGTERM)
        try:
            served.process.wait(30)
        finally:
            served.process.kill()


def test_two_mebibytes(stand_ins: Path, tmp_path: Path) -> None:
    """2 MB of /dev/shm: refused at the start in one line that says what to set."""
    with serve("2m", stand_ins, tmp_path / "log") as served:
        assert served.process.wait(60) == 2
        assert "/dev/shm has 2 MiB free" in served.output and "--shm-size=" in served.output
        assert "Traceback" not in served.output


@pytest.mark.slow
def test_sixty_four_mebibytes(stand_ins: Path, tmp_path: Path) -> None:
    """64 MB of /dev/shm, 24 calls of 8 MiB at once: answers or [overloaded]; a small call is
    answered afterwards.
    """
    with serve("64m", stand_ins, tmp_path / "log") as served:
        until(lambda: "Ctrl-C stops the server" in served.output, 120)
        image = b'{"sleep": 0.5, "rest": "' + b"x" * (8 << 20) + b'"}'
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(24) as threads:
            clients = [
                stack.enter_context(Client(url, timeout=60, retries=0)) for url in served.urls
            ]
            calls = [threads.submit(ask, clients[number % 2], image) for number in range(24)]
            found = {call.result(90) for call in calls}
            assert found == {"an answer", "ServerUnavailable overloaded"}
            for client in clients:
                deadline = time.monotonic() + 60
                while ask(client) != "an answer":
                    assert time.monotonic() < deadline, served.output
                    time.sleep(0.2)
