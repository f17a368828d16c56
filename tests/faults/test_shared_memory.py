"""A small /dev/shm, as containers have it, in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from radapter_client import Client
from radapter_serve.server.config import free_ports
from tests.faults.conftest import ask, until

pytestmark = pytest.mark.triton

HOLD = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'


@pytest.mark.slow
def test_sixty_four_mebibytes(stand_ins: Path, tmp_path: Path) -> None:
    small = ["unshare", "--mount", "sh", "-c", HOLD, "sh"]
    if not shutil.which("unshare") or subprocess.run([*small, "true"]).returncode:
        pytest.skip("no /dev/shm of its own can be mounted here, which takes root")
    http, grpc, metrics = free_ports()
    urls = [f"grpc://127.0.0.1:{grpc}", f"http://127.0.0.1:{http}"]
    flags = {"--http-port": http, "--grpc-port": grpc, "--metrics-port": metrics}
    command = [*small, sys.executable, "-m", "radapter_serve.cli.serve", str(stand_ins)]
    command += [str(word) for flag in flags.items() for word in flag]
    log = tmp_path / "log"
    image = b'{"sleep": 0.5, "rest": "' + b"x" * (8 << 20) + b'"}'
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("wb"))
        process = stack.enter_context(subprocess.Popen(command, stdout=file, stderr=file))
        stack.callback(process.terminate)
        until(lambda: "Ctrl-C stops the server" in log.read_text(errors="replace"), 120)
        clients = [stack.enter_context(Client(url, timeout=60, retries=0)) for url in urls]
        with ThreadPoolExecutor(24) as threads:
            calls = [threads.submit(ask, clients[number % 2], image) for number in range(24)]
            outcomes = {call.result(90) for call in calls}
        assert outcomes == {"an answer", "ServerUnavailable overloaded"}
        for client in clients:
            until(lambda client=client: ask(client) == "an answer", 60)  # type: ignore[misc]
