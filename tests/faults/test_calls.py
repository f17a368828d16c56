"""Calls in the middle of which a gateway, a server or another caller goes away."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import urllib3

from radapter_client import Client
from tests.faults.conftest import RunningProcess, ask, until

pytestmark = pytest.mark.triton

SLOW = b'{"sleep": 2}'


def test_a_frozen_and_a_killed_gateway(front: RunningProcess) -> None:
    """Calls to it end with an error at once or in their own time, and may be tried again."""
    with (
        Client(front.url, retries=0) as client,
        Client(front.url, retries=20, timeout=60) as patient,
        ThreadPoolExecutor(4) as threads,
    ):
        front.signal(signal.SIGSTOP)
        assert ask(client, timeout=1.0) == "Timeout None"
        front.signal(signal.SIGCONT)
        assert ask(client) == "an answer"
        calls = [threads.submit(ask, client, SLOW) for _ in range(2)]
        again = [threads.submit(ask, patient, SLOW) for _ in range(2)]
        time.sleep(0.7)
        front.end()
        assert {call.result(10) for call in calls} == {"ServerUnavailable None"}
        assert ask(client) == "ServerUnavailable None"
        front.start()
        assert {call.result(60) for call in again} == {"an answer"}
        assert ask(client) == "an answer"


def test_a_frozen_and_a_killed_client(front: RunningProcess, tmp_path: Path) -> None:
    """Other callers notice nothing, and what a killed one had asked is given up."""
    left = tmp_path / "left"
    with Client(front.url) as client:
        with caller(front, {"sleep": 1}) as asking:
            asking.send_signal(signal.SIGSTOP)
            until(lambda: running_requests(front) == 0, 10)
            assert ask(client, timeout=10.0) == "an answer"
            asking.send_signal(signal.SIGCONT)
            assert asking.wait(10) == 0
        with caller(front, {"watch": str(left)}) as asking:
            asking.kill()
        assert ask(client, timeout=10.0) == "an answer"
        until(left.exists, 15)
        until(lambda: left.read_text() == "cancelled", 1)


@contextlib.contextmanager
def caller(front: RunningProcess, order: dict[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    """A client in a process of its own, whose call through the gateway is under way."""
    code = (
        "import sys; from radapter_client import Client;"
        " Client(sys.argv[1]).classify(sys.argv[2].encode(), ['a'])"
    )
    with subprocess.Popen([sys.executable, "-c", code, front.url, json.dumps(order)]) as process:
        until(lambda: running_requests(front) > 0)
        time.sleep(0.3)
        assert process.poll() is None
        yield process


def running_requests(front: RunningProcess) -> float:
    """Number of requests that are worked on."""
    metrics = urllib3.request("GET", f"{front.url}/metrics").data
    [count] = re.findall(rb"^radapter_gateway_running (\S+)", metrics, re.MULTILINE)
    return float(count)
