"""A real tritonserver whose parts are killed, frozen, kept busy and overloaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from radapter_client import Client
from radapter_serve.server.supervisor import Probe, Supervisor
from radapter_serve.server.triton_server import TritonServer
from tests.faults.conftest import ask, outcome
from tests.faults.conftest import stand_ins as stand_ins
from tests.helpers.asking import tritonserver
from tests.helpers.fake_upstream import until

pytestmark = pytest.mark.triton


def order(**what: Any) -> bytes:
    """An image that makes the stand-in wait ("sleep") or compute ("work")."""
    return json.dumps(what).encode()


@pytest.fixture(scope="module")
def server(stand_ins: Path) -> Iterator[TritonServer]:
    settings: dict[str, Any] = {"instances": ["classify=2"], "max_waiting": 4, "drain_seconds": 5}
    with tritonserver(stand_ins, **settings) as server:
        yield server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as threads:
        yield threads


@pytest.fixture
def clients(server: TritonServer) -> Iterator[list[Client]]:
    urls = (server.grpc_url, server.http_url)
    clients = [Client(url, timeout=60, retries=0) for url in urls]
    yield clients
    for client in clients:
        client.close()


class Watched:
    """A supervisor that looks as often as a test needs, and its lines."""

    def __init__(self, server: TritonServer, probe: Probe | None = None) -> None:
        self.lines: list[str] = []
        self._supervisor = Supervisor(server, self.lines.append, probe=probe)

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, self.lines
            self._supervisor.step()
            time.sleep(0.1)

    def until_back(self, name: str) -> None:
        self.until(lambda: any(line.startswith(f"{name} is back") for line in self.lines))


def begun(threads: ThreadPoolExecutor, clients: list[Client], image: bytes) -> list[Future[str]]:
    """Calls over each protocol that are under way."""
    calls = [threads.submit(ask, client, image) for client in clients]
    time.sleep(0.7)
    return calls


def test_a_frozen_or_killed_process_of_a_model_is_back_and_its_callers_may_ask_again(
    server, clients, threads
):
    watched = Watched(server)
    calls = begun(threads, clients, order(sleep=30))
    for pid in server.pids("classify"):
        os.kill(pid, signal.SIGSTOP)
    watched.until_back("classify")
    assert [call.result() for call in calls] == ["ServerUnavailable restarting"] * 2
    why = "a signal had stopped it, so it was killed"
    assert f"classify version 2 died: {why}; starting it again" in watched.lines[0]
    for client in clients:
        assert ask(client) == "an answer"
    assert len(server.pids("classify")) == 2
    watched.lines.clear()
    for pid in server.pids("classify"):  # before anybody has looked at them
        os.kill(pid, signal.SIGKILL)
    watched.until_back("classify")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_killed_or_frozen_is_back_for_the_same_clients(
    server, clients, threads, number
):
    watched = Watched(server)
    calls = begun(threads, clients, order(sleep=30))
    os.kill(server.pid, number)
    watched.until_back("tritonserver")
    assert [call.result() for call in calls] == ["ServerUnavailable None"] * 2
    why = "tritonserver died: (it was killed by SIGKILL|a signal had stopped it)"
    assert any(re.match(why, line) for line in watched.lines)
    for client in clients:
        until(lambda client=client: ask(client) == "an answer", 10)  # type: ignore[misc]


def test_a_busy_task_is_left_alone_and_one_that_waits_for_nothing_is_started_again(
    server, clients, threads
):
    watched = Watched(server, Probe(server.control, server.cpu_seconds, interval=0.2, timeout=4.0))
    calls = [
        begun(threads, clients, order(work=10)) for _ in range(2)
    ]  # both processes, and a queue behind them
    watched.until(lambda: all(call.done() for pair in calls for call in pair))
    assert watched.lines == []
    assert {call.result() for pair in calls for call in pair} == {"an answer"}
    calls = [begun(threads, clients, order(sleep=300)) for _ in range(2)]
    watched.until_back("classify")
    assert (
        "the process of classify died: it no longer answered, so it was killed" in watched.lines[0]
    )
    assert {call.result() for pair in calls for call in pair} == {"ServerUnavailable restarting"}


def test_many_large_requests_at_once_are_refused_and_take_bounded_memory(server, clients, threads):
    def resident() -> int:
        return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    before = resident()
    most = [0]
    done = threading.Event()

    def measure() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], resident())

    threads.submit(measure)
    busy = threads.submit(outcome, lambda: clients[0].segment(order(sleep=3), ["a"]))
    time.sleep(0.7)
    image = order(sleep=0, rest="x" * (4 << 20))
    calls = [
        threads.submit(outcome, partial(clients[n % 2].segment, image, ["a"])) for n in range(60)
    ]
    outcomes = [call.result() for call in calls]
    done.set()
    assert busy.result() == "an answer"
    assert set(outcomes) == {"an answer", "ServerUnavailable overloaded"}
    # Those that are sent after the first were refused find room again; 38 send at once.
    assert outcomes.count("an answer") <= 4 + 40
    assert most[0] - before < 38 * 3 * len(image)


@pytest.mark.parametrize(("task", "processes"), [("segment", 1), ("classify", 2)])
def test_what_waits_is_begun_as_soon_as_a_process_is_free(
    server, clients, threads, task, processes
):
    """Triton's own limit of a queue made it wait for half a second longer, every second time."""

    def call(seconds: float) -> float:
        getattr(clients[0], task)(order(sleep=seconds), ["a"])
        return time.monotonic()

    delays = []
    for _ in range(12):
        first = threads.submit(call, 0.2)
        others = [threads.submit(call, 0.9) for _ in range(processes - 1)]
        time.sleep(0.1)
        delays.append(threads.submit(call, 0).result() - first.result())
        for other in others:
            other.result()
    assert [delay for delay in delays if delay > 0.3] == []


def test_stopping_lets_calls_under_way_finish_and_is_unavailable_to_others(stand_ins, threads):
    """It takes its models away meanwhile, one after the other."""
    with tritonserver(stand_ins) as server, contextlib.ExitStack() as stack:
        busy, others = (
            [
                stack.enter_context(Client(url, timeout=30, retries=0))
                for url in (server.grpc_url, server.http_url)
            ]
            for _ in range(2)
        )
        calls = begun(threads, busy, order(sleep=2))
        stopping = threads.submit(server.stop)
        seen = set()
        while not stopping.done():
            for client in others:
                for call in (partial(client.embed_texts, ["x"] * 40), client.release):
                    seen.add(outcome(call).partition(" ")[0])
        assert [call.result() for call in calls] == ["an answer"] * 2
        stopping.result()
        assert seen - {"an"} == {"ServerUnavailable"}
    assert server.failures()[0].why == "it was not started, or it was stopped"
