"""Threads that work for callers: cancelled when nobody waits for them, and never in the way of the
exit or of the probes.
"""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from radapter_client import Reply
from radapter_serve.cli import serve
from radapter_serve.contract.errors import Cancelled, TaskError
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway import app, in_process
from radapter_serve.gateway.access import Threads
from radapter_serve.gateway.app import Health
from radapter_serve.gateway.in_process import InProcess
from radapter_serve.gateway.upstream import Entry, Inference, Refused
from radapter_serve.release.release import TASKS
from radapter_serve.server.config import ServerConfig


class Working:
    """An engine whose callers wait until they are cancelled, or until `go`; it answers probes."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = 0
        self.cancelled = 0
        self.deaf = False  # whether it looks at `go` alone

    def infer(
        self,
        model: str,
        version: str,
        inputs: Any,
        outputs: Any,
        *,
        deadline: float = math.inf,
        cancelled: Cancelled,
    ) -> Reply:
        if inputs:  # a probe has some
            return Reply(1, {})
        self.running += 1
        try:
            while not self.go.wait(0.01):
                if cancelled() and not self.deaf:
                    self.cancelled += 1
                    raise TaskError("cancelled", "the caller gave up")
            return Reply(1, {})
        finally:
            self.running -= 1

    def versions(self) -> list[int]:
        return [1]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Working]:
    engine = Working()
    monkeypatch.setattr(in_process, "CLOSE_SECONDS", 0.05)
    yield engine
    engine.go.set()


async def reached(condition: Callable[[], object]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 20)


WORK = Inference("classify", "", {})


def test_the_work_of_a_caller_who_leaves_is_cancelled_and_its_thread_comes_back(
    engine: Working,
) -> None:
    async def main() -> None:
        upstream = InProcess(engine, 1)  # type: ignore[arg-type]
        for number in range(3):
            asking = asyncio.ensure_future(upstream.infer(WORK, 60, Entry("1")))
            await reached(lambda: engine.running == 1)
            asking.cancel()
            await reached(lambda: engine.running == 0)
            assert engine.cancelled == number + 1
        engine.go.set()
        assert (await upstream.infer(WORK, 60, Entry("1"))).version == 1
        await upstream.close()

    asyncio.run(main())


def test_a_place_is_taken_until_its_thread_has_ended(engine: Working) -> None:
    async def main() -> None:
        engine.deaf = True
        upstream = InProcess(engine, 1)  # type: ignore[arg-type]
        first = asyncio.ensure_future(upstream.infer(WORK, 60, Entry("1")))
        await reached(lambda: engine.running == 1)
        first.cancel()
        second = asyncio.ensure_future(upstream.infer(WORK, 60, Entry("2")))
        third = asyncio.ensure_future(upstream.infer(WORK, 60, Entry("3")))
        await asyncio.sleep(0.05)
        second.cancel()  # it waits, and leaves nothing behind
        assert engine.running == 1
        engine.go.set()
        assert (await third).version == 1
        await upstream.close()

    asyncio.run(main())


def test_probes_are_answered_although_all_request_threads_work(engine: Working) -> None:
    async def main() -> None:
        upstream = InProcess(engine, 2)  # type: ignore[arg-type]
        asking = [asyncio.ensure_future(upstream.infer(WORK, 60, Entry("1"))) for _ in range(3)]
        await reached(lambda: engine.running == 2)
        assert await asyncio.wait_for(Health(upstream).trouble(), 20) is None
        assert engine.running == 2
        for task in asking:
            task.cancel()
        await upstream.close()

    asyncio.run(main())


def test_ready_says_so_if_a_task_never_answers(
    engine: Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "SHORT_TIMEOUT", 0.05)
    monkeypatch.setattr(app, "PROBES", {task: {} for task in TASKS})  # which Working never answers

    async def main() -> None:
        engine.deaf = True
        upstream = InProcess(engine, 1)  # type: ignore[arg-type]
        why = await asyncio.wait_for(Health(upstream).trouble(), 20)
        assert "does not answer" in str(why)

    asyncio.run(main())


def test_a_failure_in_a_thread_keeps_nothing() -> None:
    class Held:
        pass

    kept: list[weakref.ref[Held]] = []

    def fail() -> None:
        held = Held()
        kept.append(weakref.ref(held))
        raise Refused(400, "no_labels", "none")

    async def main() -> None:
        try:
            await Threads(1, "request").run(fail)
        except Refused as error:
            error.__traceback__ = None  # as `Errors` does it

    gc.disable()
    try:
        asyncio.run(main())
        assert kept[0]() is None
    finally:
        gc.enable()


def test_threads_stay_for_the_next_calls_and_end_with_the_last_reference() -> None:
    begun: set[threading.Thread] = set()
    both = threading.Barrier(2)

    def call() -> None:
        begun.add(threading.current_thread())
        both.wait(20)

    async def main() -> None:
        threads = Threads(2, "request")
        for _ in range(3):
            await asyncio.gather(threads.run(call), threads.run(call))
        assert len(begun) == 2

    asyncio.run(main())
    gc.collect()
    for thread in begun:
        thread.join(20)
        assert not thread.is_alive()


ENDLESS = """
import threading
from radapter_serve.gateway import in_process
from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import Settings, Timeouts
from radapter_serve.release.release import TASKS
from radapter_serve.server.config import ServerConfig

class Endless:
    def infer(self, *arguments, **options):
        print("working\\n", end="", flush=True)  # at once: two probes may print
        threading.Event().wait()

    def versions(self):
        return [1]

in_process.CLOSE_SECONDS = 0.1
upstream = lambda: in_process.InProcess(Endless(), 1)
with GatewayServer(Settings(port=0), upstream, Timeouts(drain=0.1)) as server:
    print(server.url, flush=True)
    server.run()
"""


def test_sigterm_ends_the_process_although_a_thread_works() -> None:
    command = [sys.executable, "-c", ENDLESS]
    folder = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            script = f"import urllib3; urllib3.request('GET', '{url}/health/ready', timeout=60)"
            with subprocess.Popen(
                [sys.executable, "-c", script], stderr=subprocess.DEVNULL
            ) as asking:
                assert process.stdout.readline() == "working\n"
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                asking.kill()
        finally:
            process.kill()


def test_a_server_in_one_process_has_one_thread_of_blas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more, requests that map labels at once wait for each other."""
    counts: list[int] = []

    def stop(*_: object) -> None:
        counts.extend(
            pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"
        )
        raise RAdapterError("stop")

    monkeypatch.setattr(in_process, "in_front_of", stop)
    with threadpool_limits(2, "blas"), pytest.raises(RAdapterError, match="stop"):
        serve.answer_in_process(ServerConfig(tmp_path), serve.GatewayFlags())
    assert {*counts} == {1}
