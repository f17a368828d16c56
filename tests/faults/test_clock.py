"""A clock that jumps, as it does when a machine wakes up or its time is set."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from radapter_client import Client
from radapter_serve.server.supervisor import Supervisor
from tests.faults.conftest import RunningGateway, outcome
from tests.helpers.fake_server import FakeServer
from tests.test_house import sources

JUMPS = pytest.mark.parametrize("jump", [86_400, -86_400])


def test_no_wait_reads_the_time_of_day() -> None:
    """Nothing in the server, the gateway and the client reads the time of day to wait: time.time is
    called for the beginning of a span alone.
    """
    modules = {**sources("radapter_serve"), **sources("clients/radapter_client")}
    del modules["radapter_serve.encoders.steps"]
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "time"
            ):
                assert node.attr not in ("time", "time_ns"), f"{name}, line {node.lineno}"


def jump_in_mid_call(
    server: FakeServer, gateway: RunningGateway, set_clock: Callable[[int], object]
) -> None:
    """By each way in, a jump, one call whose answer comes after it, and one whose time is over
    after it.
    """
    for jumps, url in enumerate((*server.urls.values(), gateway.url), 1):
        with Client(url, retries=0) as client, ThreadPoolExecutor(2) as threads:
            good = threads.submit(
                outcome, partial(client.classify, b'{"sleep": 0.6}', ["a"], timeout=20.0)
            )
            late = threads.submit(
                outcome, partial(client.segment, b'{"sleep": 1.5}', ["a"], timeout=0.8)
            )
            time.sleep(0.2)
            set_clock(jumps)
            assert good.result(30) == "an answer"
            assert late.result(30).startswith("Timeout")


@pytest.mark.triton
@JUMPS
def test_a_clock_that_jumps_in_the_middle_of_a_call(
    running: FakeServer, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """A client's clock that jumps a day ahead or back in the middle of a call changes no answer and
    no time-out.
    """
    true = time.time
    jump_in_mid_call(
        running,
        gateway,
        lambda jumps: monkeypatch.setattr(time, "time", lambda: true() + jumps * jump),
    )


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that says how far the time of day of all processes that are started from now on is
    off.
    """
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    if not found:
        pytest.skip(
            "only libfaketime can set the clock of a server alone; install it with: apt install"
            " libfaketime"
        )
    file = tmp_path / "clock"
    file.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(found[0]))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(file))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    yield file


def put_off(clock: Path, seconds: int) -> None:
    """Set the clock; libfaketime ends a process that reads the file half written."""
    new = clock.with_name("new")
    new.write_text(f"{seconds:+d}")
    new.replace(clock)


@pytest.mark.triton
@JUMPS
def test_a_clock_of_the_server_that_jumps(clock: Path, stand_ins: Path, jump: int) -> None:
    """The clock of tritonserver, its models and the gateway jumps: no answer and no time-out
    changes, nothing dies.
    """
    with FakeServer(stand_ins, instances=["2"], drain_seconds=5) as server:
        gateway = RunningGateway(server.grpc_url.removeprefix("grpc://"))
        try:
            said: list[str] = []
            supervisor = Supervisor(server, said.append)
            supervisor.step()
            jump_in_mid_call(server, gateway, lambda jumps: put_off(clock, jumps * jump))
            supervisor.step()
            assert said == []
        finally:
            gateway.end()
