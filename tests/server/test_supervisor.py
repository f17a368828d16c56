"""Processes that die or fall silent, and requests that are too many, with stand-ins for Triton."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SURPLUS
from radapter_serve.server.control import Answer, NoAnswer, warm_up
from radapter_serve.server.models import full_shared_memory
from radapter_serve.server.supervisor import (
    BUSY_SECONDS,
    INTERVAL_SECONDS,
    MAX_FAILURES,
    MAX_PAUSE_SECONDS,
    TIMEOUT_SECONDS,
    WINDOW_SECONDS,
    Probe,
    Supervisor,
)
from radapter_serve.server.watch import SERVER, Death, Watch
from radapter_serve.triton.backlog import Backlog, Surplus
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import until

# Starts two processes whose first argument is that of a model, and waits. It keeps them, for a
# Popen that goes away asks after its process, of which nothing is left then if it is dead already.
PARENT = """
import subprocess, sys, time
folder = sys.argv[1]
names = ("classify/1", "segment/12")
kept = [subprocess.Popen([sys.executable, f"{folder}/{name}/model.py"]) for name in names]
time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with two children that look like those of models."""
    for name in ("classify/1", "segment/12"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "model.py").write_text("import time\ntime.sleep(60)\n")
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True) as process:
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def first_of(watch: Watch) -> list[Death]:
    """The first failures that a watch reports."""
    deaths: list[Death] = []

    def has_died() -> bool:
        deaths.extend(watch.poll())
        return bool(deaths)

    until(has_died)
    return deaths


@pytest.mark.parametrize(
    ("name", "number", "why"),
    [
        ("segment", signal.SIGKILL, "it was killed by SIGKILL"),
        ("classify", signal.SIGSTOP, "a signal had stopped it, so it was killed"),
        (SERVER, signal.SIGKILL, "it was killed by SIGKILL"),
        (SERVER, signal.SIGSEGV, "segmentation fault, .* Content-Type: application/json"),
        (SERVER, signal.SIGSTOP, "a signal had stopped it, so it was killed"),
    ],
)
def test_a_death_is_reported_once_with_its_reason(parent, name, number, why):
    watch = Watch(parent)
    until(lambda: len(watch.models()) == 2 and watch.poll() == [])
    pids = {model: pid for pid, model in watch.models().items()} | {SERVER: parent.pid}
    os.kill(pids[name], number)
    [failure] = first_of(watch)
    assert failure.name == name and re.search(why, failure.why)
    if name != SERVER:
        assert failure.version == {"classify": 1, "segment": 12}[name]
        until(lambda: psutil.Process(pids[name]).status() == psutil.STATUS_ZOMBIE)
        assert watch.poll() == watch.poll() == []
        assert set(watch.models().values()) == {"classify", "segment"} - {name}


def test_a_process_that_is_stopped_after_its_model_was_reported_is_killed_unreported(
    parent, tmp_path
):
    two = [sys.executable, "-c", PARENT.replace("segment/12", "classify/1"), str(tmp_path)]
    with subprocess.Popen(two, start_new_session=True) as process:
        watch = Watch(process)
        until(lambda: len(watch.models()) == 2 and watch.poll() == [])
        first, second = watch.models()
        os.kill(first, signal.SIGSTOP)
        assert [failure.name for failure in first_of(watch)] == ["classify"]
        os.kill(second, signal.SIGSTOP)
        reports: list[Death] = []

        def is_gone() -> bool:
            reports.extend(watch.poll())
            return not watch.models()

        until(is_gone)
        reports += watch.poll()
        os.killpg(process.pid, signal.SIGKILL)
        assert reports == []


def test_a_process_that_is_a_zombie_for_one_poll_has_not_died(monkeypatch: pytest.MonkeyPatch):
    """As one whose model is being unloaded."""
    process = Mock(pid=1, poll=Mock(return_value=None))
    watch = Watch(process)
    running = {1: psutil.STATUS_SLEEPING, 2: psutil.STATUS_SLEEPING}
    zombie = {**running, 2: psutil.STATUS_ZOMBIE}
    states = iter([running, zombie, {1: psutil.STATUS_SLEEPING}, zombie, zombie])
    monkeypatch.setattr(watch, "_states", lambda: next(states))
    assert [watch.poll() for _ in range(4)] == [[]] * 4
    [failure] = watch.poll()
    assert failure.name == SERVER


class Scene:
    """A supervisor of a stand-in for a server, in which one of `deaths` is found at each look."""

    def __init__(self, *deaths: str, fails: int = 0, silent: Sequence[str] = ()) -> None:
        self.deaths = list(deaths)
        self.fails = fails
        self.error = RAdapterError("no room")
        self.done: list[str] = []
        self.clock = FakeClock()
        self.lines: list[str] = []
        self.models = {"classify": [1], "segment": [1]}
        self.full: Iterator[str | None] = itertools.repeat(None)  # what is said of /dev/shm
        probe = Mock(step=Mock(return_value=list(silent)))
        probe.forget = probe.step.return_value.clear
        server: Any = self
        self.supervisor = Supervisor(
            server,
            self.lines.append,
            clock=self.clock,
            probe=probe,
            full=lambda: next(self.full),
        )

    def failures(self) -> list[Death]:
        return [Death(self.deaths.pop(0), "why", 2)] if self.deaths else []

    def kill(self, name: str) -> None:
        self.done.append(f"kill {name}")

    def reload(self, name: str) -> None:
        self.done.append(f"reload {name}")
        if self.fails:
            self.fails -= 1
            raise self.error

    def restart(self) -> None:
        self.done.append("restart")

    def steps(self, count: int = 1) -> Scene:
        for _ in range(count):
            self.supervisor.step()
        return self


def test_what_died_or_fell_silent_is_started_again_and_the_log_names_it():
    scene = Scene("classify").steps()
    assert scene.done == ["reload classify"]
    assert scene.lines == [
        "the process of classify version 2 died: why; starting it again",
        "classify is back after 0.0 s",
    ]
    assert Scene(silent=["segment"]).steps().done == ["kill segment", "reload segment"]
    scene = Scene()
    both = [Death("classify", "why", 2), Death(SERVER, "why")]
    scene.failures = lambda: both  # type: ignore[method-assign]
    assert scene.steps().done == ["restart"]  # with all its models


@pytest.mark.parametrize("name", [SERVER, "classify"])
def test_a_program_that_becomes_ready_in_between_is_started_again_for_ever_with_pauses(name):
    """Six requests that end tritonserver, in 51 s, ended the supervisor."""
    scene = Scene(*[name] * 40).steps(40)
    assert len(scene.done) == 40
    assert scene.clock.slept[:6] == [0, 1, 2, 4, 8, 8]
    assert max(scene.clock.slept) == MAX_PAUSE_SECONDS
    scene.clock.sleep(WINDOW_SECONDS + 1)
    scene.deaths = [name]
    assert scene.steps().clock.slept[-1] == 0


def test_a_model_that_never_becomes_ready_is_given_up():
    scene = Scene("classify", fails=MAX_FAILURES - 1).steps()
    assert scene.done == ["reload classify"] * MAX_FAILURES
    scene = Scene("classify", fails=100)
    message = "version 2 died: it could not be started again: no room; it has not become ready in 5"
    with pytest.raises(RAdapterError, match=message):
        scene.steps()
    assert scene.done == ["reload classify"] * MAX_FAILURES


def test_while_shared_memory_is_full_nothing_is_started_and_nothing_given_up():
    scene = Scene("classify")
    scene.full = itertools.chain(["it is full"] * 100, itertools.repeat(None))
    scene.steps(2)
    assert scene.lines == [
        "it is full",
        "the process of classify version 2 died: why; starting it again",
        "classify is back after 0.0 s",
    ]
    assert scene.clock.slept == [0, *[INTERVAL_SECONDS] * 99]
    assert scene.done == ["reload classify"]
    # It is said again when it is full again.
    scene.full = iter(["it is full", "it is full", None, "it is full"])
    assert scene.steps(4).lines[3:] == ["it is full"] * 2


def test_shared_memory_is_full_where_no_process_can_start(tmp_path, monkeypatch):
    for free, is_full in ((2**20 - 4096, True), (2**20, False)):
        memory = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, memory=memory: memory)
        assert (full_shared_memory() is not None) == is_full
    assert full_shared_memory(tmp_path / "none") is None


def test_a_server_that_becomes_ready_brings_its_models_back_and_else_is_given_up():
    deaths = ["classify", SERVER] * (MAX_FAILURES + 1)
    scene = Scene(*deaths, fails=100)
    scene.error = NoAnswer("it died meanwhile")
    assert scene.steps(len(deaths)).done == ["reload classify", "restart"] * (MAX_FAILURES + 1)

    scene = Scene(*[SERVER] * (MAX_FAILURES + 1))
    scene.restart = Mock(side_effect=NoAnswer("it died"))  # type: ignore[method-assign]
    scene.steps(MAX_FAILURES)
    with pytest.raises(RAdapterError, match="tritonserver died: why; it has not become ready"):
        scene.steps()


class Asked:
    """A control with the answers of a test, by model."""

    def __init__(self, **answers: Answer) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def ask(self, path: str, body: object = None, *, timeout: float = 1.0) -> Answer:
        self.asked.append(path)
        answer = self.answers.get("health" if body is None else path.split("/")[1])
        if answer is None:
            raise NoAnswer("none")
        return answer


FINE = Answer(200, {})
REFUSED = Answer(400, {"error": "[no_labels] ..."})
BROKEN = Answer(500, {"error": "why"})


class AtOnce(Executor):
    """Calls a function before `submit` returns."""

    def submit(self, function, /, *args, **kwargs):
        answer: Future[Any] = Future()
        answer.set_result(function(*args, **kwargs))
        return answer


def silent_models(control: Any, busy: float = 0.0) -> list[list[str]]:
    """What five steps of a probe find, which asks in steps 2 and 4 and judges after each."""
    clock = FakeClock()
    used = lambda _: round(clock.now / TIMEOUT_SECONDS) * busy  # noqa: E731
    asking = Probe(control, used, clock=clock, threads=AtOnce())
    silent = []
    for _ in range(5):
        clock.sleep(TIMEOUT_SECONDS)
        silent.append(asking.step(["classify", "segment"]))
    return silent


NOTHING: list[list[str]] = [[]] * 5


def test_a_task_is_silent_after_two_requests_unless_it_answers_or_works():
    for answer in (FINE, REFUSED, BROKEN, Answer(503, {"error": "queue"})):
        control = Asked(health=FINE, classify=answer, segment=REFUSED)
        assert silent_models(control) == NOTHING
        paths = {"health/live", "models/classify/infer", "models/segment/infer"}
        assert set(control.asked) == paths
    assert silent_models(Asked(health=FINE, segment=FINE)) == [*NOTHING[:4], ["classify"]]
    assert silent_models(Asked(), busy=2 * BUSY_SECONDS) == NOTHING
    assert silent_models(Asked(), busy=BUSY_SECONDS / 2)[-1] == [SERVER]


def test_before_it_is_ready_every_version_of_every_task_is_asked():
    control: Any = Asked(classify=FINE, segment=REFUSED)
    warm_up(control, {"classify": [1, 2], "image_encoder": [2], "segment": [2]}, 5)
    assert control.asked == [
        f"models/{name}/infer"
        for name in ("classify/versions/1", "classify/versions/2", "segment/versions/2")
    ]
    broken: Any
    for broken, message in ((Asked(classify=BROKEN), "fails: why"), (Asked(), "answer within 5 s")):
        with pytest.raises(RAdapterError, match=f"classify version 1 .*{message}"):
            warm_up(broken, {"classify": [1]}, 5)


METRICS = """
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{{model="classify",version="1"}} 3
nv_inference_pending_request_count{{model="classify",version="2"}} {waiting}
nv_inference_count{{model="classify",version="2"}} 700
nv_cpu_utilization 0.5
"""


def test_each_process_refuses_its_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SURPLUS, str(tmp_path))
    processes = {"classify": 2, "segment": 1}
    # Its thread reads no metrics there.
    backlog = Backlog("http://localhost:1/metrics", tmp_path, lambda: processes, 4)
    first, second, segment = Surplus(), Surplus(), Surplus()
    for surplus, model in ((first, "classify"), (second, "classify"), (segment, "segment")):
        surplus.open(model)
    backlog.observe(METRICS.format(waiting=6))
    assert (first.take(2), first.take(10), first.take(10)) == (2, 1, 0)
    assert (second.take(10), segment.take(10)) == (3, 0)
    backlog.observe(METRICS.format(waiting=6))  # as many again
    assert first.take(10) == 3
    backlog.observe(METRICS.format(waiting=1))
    assert second.take(10) == 0
    assert list(tmp_path.iterdir()) == []
    backlog.stop()
