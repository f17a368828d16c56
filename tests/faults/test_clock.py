"""A clock that jumps, as it does when a machine wakes up or its time is set."""

from __future__ import annotations

import ast
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from radapter_client import Client
from tests.faults.conftest import RunningGateway, outcome
from tests.helpers.fake_server import FakeServer
from tests.test_house import sources


def test_no_wait_reads_the_time_of_day() -> None:
    """Nothing in the server, the gateway and the client reads the time of day to wait: time.time is not called."""
    for name, path in {**sources("radapter_serve"), **sources("clients/radapter_client")}.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr not in ("time", "time_ns"), f"{name}, line {node.lineno}"


@pytest.mark.triton
@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_a_clock_that_jumps_in_the_middle_of_a_call(
    running: FakeServer, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """A client's clock that jumps a day ahead or back in the middle of a call changes no answer and no time-out."""
    true = time.time
    for url in (running.grpc_url, running.http_url, gateway.url):
        with Client(url, retries=0) as client, ThreadPoolExecutor(2) as threads, monkeypatch.context() as patch:
            good = threads.submit(outcome, partial(client.classify, b'{"sleep": 0.6}', ["a"], timeout=20.0))
            late = threads.submit(outcome, partial(client.segment, b'{"sleep": 1.5}', ["a"], timeout=0.8))
            time.sleep(0.2)
            patch.setattr(time, "time", lambda: true() + jump)
            assert good.result(30) == "an answer"
            assert late.result(30).startswith("Timeout")
