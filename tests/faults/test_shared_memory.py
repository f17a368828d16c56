"""A small /dev/shm, as containers have it, in a mount namespace of its own; others may fill it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from radapter_client import Client
from radapter_serve.server.config import free_ports
from tests.faults.conftest import ask, outcome, until

pytestmark = pytest.mark.triton

SIZE = 64  # MiB of /dev/shm
HOLD = f"mount -t tmpfs -o size={SIZE}m tmpfs /dev/shm && head -c $0M /dev/zero > /dev/shm/other"


@dataclass
class Server:
    """A radapter-serve whose /dev/shm is its own, and clients over gRPC and HTTP."""

    process: subprocess.Popen[bytes]
    log: Path
    clients: list[Client]

    @property
    def memory(self) -> Path:
        """Its /dev/shm."""
        return Path("/proc", str(self.process.pid), "root/dev/shm")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def is_ready(self) -> bool:
        return "Ctrl-C stops the server" in self.said()

    def ask(self, image: bytes, count: int) -> set[str]:
        """The outcomes of so many requests at once."""
        with ThreadPoolExecutor(count) as threads:
            calls = [threads.submit(ask, self.clients[each % 2], image) for each in range(count)]
            return {call.result(90) for call in calls}

    def fill(self) -> None:
        """Let another program take all that is free."""
        filler = self.memory / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass


@pytest.fixture
def start(stand_ins: Path, tmp_path: Path) -> Iterator[Callable[[int], Server]]:
    """Starts a server, of whose /dev/shm another program has so many MiB."""
    with contextlib.ExitStack() as stack:

        def start(taken: int) -> Server:
            private = ["unshare", "--mount", "sh", "-c", f'{HOLD} && exec "$@"', str(taken)]
            if not shutil.which("unshare") or subprocess.run([*private, "true"]).returncode:
                pytest.skip("no /dev/shm of its own can be mounted here, which takes root")
            http, grpc, metrics = free_ports()
            urls = [f"grpc://127.0.0.1:{grpc}", f"http://127.0.0.1:{http}"]
            flags = {"--http-port": http, "--grpc-port": grpc, "--metrics-port": metrics}
            command = [*private, sys.executable, "-m", "radapter_serve.cli.serve", str(stand_ins)]
            command += [str(word) for flag in flags.items() for word in flag]
            log = tmp_path / "log"
            file = stack.enter_context(log.open("wb"))
            process = stack.enter_context(subprocess.Popen(command, stdout=file, stderr=file))
            stack.callback(process.terminate)
            clients = [stack.enter_context(Client(url, timeout=60, retries=0)) for url in urls]
            server = Server(process, log, clients)
            until(lambda: server.is_ready() or process.poll() is not None, 120)
            return server

        yield start


@pytest.mark.slow
def test_sixty_four_mebibytes(start: Callable[[int], Server]) -> None:
    server = start(0)
    image = b'{"sleep": 0.5, "rest": "' + b"x" * (8 << 20) + b'"}'
    assert server.ask(image, 24) == {"an answer", "ServerUnavailable overloaded"}
    for client in server.clients:
        until(lambda client=client: ask(client) == "an answer", 60)  # type: ignore[misc]


@pytest.mark.slow
def test_others_that_fill_it(start: Callable[[int], Server]) -> None:
    """Before the start, which says what to do; and later: large requests are refused, small ones
    are answered, and a process that dies is started again once there is room, however late.
    """
    refused = start(SIZE - 2)
    assert refused.process.wait(60) == 2
    [line] = refused.said().strip().splitlines()
    assert "/dev/shm has 2 MiB free beside 62 MiB of other programs (ls -lS /dev/shm)" in line
    assert "--shm-size=128m" in line

    server = start(1)
    server.fill()
    assert server.ask(b"x", 4) == {"an answer"}
    assert server.ask(b'{"rest": "' + b"x" * (8 << 20) + b'"}', 4) == {
        "ServerUnavailable overloaded"
    }
    until(lambda: "/dev/shm is full, so large requests are refused" in server.said(), 30)
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if "/classify/" in " ".join(process.cmdline()):
            process.kill()
    until(lambda: "classify version 2 died" in server.said(), 30)
    # Five starts that fail, with their pauses, take 15 s.
    end = time.monotonic() + 20
    while time.monotonic() < end:
        assert server.ask(b"x", 1) <= {"ServerUnavailable restarting"}
        for client in server.clients:
            assert outcome(lambda client=client: client.embed_texts(["a"])) == "an answer"  # type: ignore[misc]
        time.sleep(1)
    assert server.process.poll() is None
    (server.memory / "filler").unlink()
    until(lambda: "classify is back" in server.said(), 60)
    assert server.ask(b"x", 4) == {"an answer"}
    assert server.said().count("/dev/shm is full") == 1
