"""What is done about what dies or falls silent, with stand-ins for the server and its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from radapter_serve.errors import RAdapterError
from radapter_serve.server import probe
from radapter_serve.server import watch as watch_module
from radapter_serve.server.control import Answer, Control, NoAnswer
from radapter_serve.server.probe import TIMEOUT_SECONDS, Probe, warm_up
from radapter_serve.server.processes import how_it_ended
from radapter_serve.server.supervisor import (
    MAX_FAILURES,
    MAX_PAUSE_SECONDS,
    STEADY_SECONDS,
    WINDOW_SECONDS,
    Supervisor,
)
from radapter_serve.server.watch import GATEWAY, SERVER, Failure, Watch
from tests.helpers.fake_clock import FakeClock
from tests.helpers.stand_ins import http_server

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
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], start_new_session=True
    ) as process:
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def looked(parent: subprocess.Popen[bytes]) -> tuple[Watch, dict[str, int]]:
    """A watch that has seen both children, and their numbers by model."""
    watch = Watch(parent)
    deadline = time.monotonic() + 20
    while len(watch.models()) < 2:
        assert watch.poll() == [] and time.monotonic() < deadline
        time.sleep(0.01)
    return watch, {name: pid for pid, name in watch.models().items()}


def until(found: Any) -> Any:
    """What `found` gives, once that is something."""
    deadline = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_a_killed_model_is_told_once_with_its_signal(parent):
    watch, pids = looked(parent)
    os.kill(pids["segment"], signal.SIGKILL)
    assert until(watch.poll) == [Failure("segment", "it was killed by SIGKILL", 12)]
    assert watch.poll() == watch.poll() == []
    assert set(watch.models().values()) == {"classify"}


def test_a_model_that_a_signal_has_stopped_is_killed(parent):
    watch, pids = looked(parent)
    os.kill(pids["classify"], signal.SIGSTOP)
    assert until(watch.poll) == [
        Failure("classify", "a signal had stopped it, so it was killed", 1)
    ]
    until(lambda: psutil.Process(pids["classify"]).status() == psutil.STATUS_ZOMBIE)
    assert watch.poll() == watch.poll() == []


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, "it was killed by SIGKILL"),
        (signal.SIGSEGV, "segmentation fault, .* Content-Type: application/json"),
        (signal.SIGSTOP, "a signal had stopped it, so it was killed"),
    ],
)
def test_the_server_itself(parent, number, why):
    watch, _ = looked(parent)
    parent.send_signal(number)
    [failure] = until(watch.poll)
    assert failure.name == SERVER
    assert re.search(why, failure.why)


def test_a_process_that_the_kernel_killed_for_memory(parent, monkeypatch):
    kills = iter([3, *[4] * 100])
    monkeypatch.setattr(watch_module, "killed_for_memory", lambda: next(kills))
    watch = Watch(parent)
    parent.kill()
    [failure] = until(watch.poll)
    assert str(failure) == "tritonserver died: the kernel killed it, because memory ran out"
    assert how_it_ended(-15, short_of_memory=True) == "it was killed by SIGTERM"
    assert how_it_ended(1, short_of_memory=True) == "it ended by itself with status 1"


class Server:
    """What a supervisor asks of a server; each look gives the next of `polls`."""

    def __init__(self, *polls: list[Failure], fails: int = 0) -> None:
        self.polls = list(polls)
        self.fails = fails
        self.error = RAdapterError("no room")
        self.restart_error: RAdapterError | None = None
        self.done: list[str] = []
        self.models = {"classify": [1], "segment": [1]}

    def failures(self) -> list[Failure]:
        return self.polls.pop(0) if self.polls else []

    def kill(self, name: str) -> None:
        self.done.append(f"kill {name}")

    def reload(self, name: str) -> None:
        self.done.append(f"reload {name}")
        if self.fails or isinstance(self.error, NoAnswer):
            self.fails -= 1
            raise self.error

    def restart(self) -> None:
        self.done.append("restart")
        if self.restart_error is not None:
            raise self.restart_error


class Silent:
    """A probe that finds what a test says."""

    def __init__(self, *silent: str) -> None:
        self.silent = list(silent)

    def step(self, _: object) -> list[str]:
        return self.silent

    def forget(self) -> None:
        self.silent = []


class Sidecar:
    """A program that is kept up beside the server; each look gives the next of `whys`."""

    name = GATEWAY
    starts = 0

    def __init__(self, *whys: str | None) -> None:
        self.whys = list(whys)

    def died(self) -> str | None:
        return self.whys.pop(0) if self.whys else None

    def start(self) -> None:
        self.starts += 1


class Scene:
    """A supervisor with stand-ins; a look finds the next of `polls` dead."""

    def __init__(
        self,
        *polls: list[Failure],
        fails: int = 0,
        silent: Sequence[str] = (),
        beside: Sequence[Sidecar] = (),
    ) -> None:
        self.server = Server(*polls, fails=fails)
        self.clock = FakeClock()
        self.said: list[str] = []
        self.supervisor = Supervisor(
            self.server,  # type: ignore[arg-type]
            self.said.append,
            beside,
            clock=self.clock,
            probe=Silent(*silent),  # type: ignore[arg-type]
        )


def test_a_dead_model_is_loaded_again_and_what_happened_is_said():
    scene = Scene([Failure("classify", "it was killed by SIGKILL", 2)])
    scene.supervisor.step()
    assert scene.server.done == ["reload classify"]
    assert scene.said == [
        "the process of classify version 2 died: it was killed by SIGKILL; starting it again",
        "classify is back after 0.0 s",
    ]


def test_what_no_longer_answers_is_killed_and_started_again():
    scene = Scene(silent=["segment"])
    scene.supervisor.step()
    assert scene.server.done == ["kill segment", "reload segment"]
    assert "segment died: it no longer answered, so it was killed" in scene.said[0]
    scene = Scene([Failure("classify", "it was killed", 2), Failure(SERVER, "it was killed")])
    scene.supervisor.step()
    assert scene.server.done == ["restart"]  # with all its models


@pytest.mark.parametrize("name", [SERVER, "classify"])
def test_what_becomes_ready_in_between_is_started_again_for_ever_with_pauses(name):
    """Six requests that end tritonserver, in 51 s, ended the supervisor."""
    scene = Scene(*[[Failure(name, "it was killed")] for _ in range(40)])
    for _ in range(40):
        scene.supervisor.step()
    assert len(scene.server.done) == 40
    assert scene.clock.slept[:6] == [0, 1, 2, 4, 8, 8]
    assert max(scene.clock.slept) == MAX_PAUSE_SECONDS
    scene.clock.sleep(WINDOW_SECONDS + 1)
    scene.server.polls = [[Failure(name, "why")]]
    scene.supervisor.step()
    assert scene.clock.slept[-1] == 0


def test_what_fails_to_start_is_tried_again_and_given_up_where_it_never_becomes_ready():
    scene = Scene([Failure("classify", "why", 1)], fails=MAX_FAILURES - 1)
    scene.supervisor.step()
    assert scene.server.done == ["reload classify"] * MAX_FAILURES
    scene = Scene([Failure("classify", "why", 1)], fails=100)
    with pytest.raises(
        RAdapterError,
        match=(
            "classify version 1 died: it could not be started again: no room; "
            "it has not become ready in 5 starts, .*: radapter-serve --verbose"
        ),
    ):
        scene.supervisor.step()
    assert scene.server.done == ["reload classify"] * MAX_FAILURES


def test_a_server_that_is_ready_brings_its_models_back():
    polls = [[Failure("classify", "why", 1)], [Failure(SERVER, "why")]] * (MAX_FAILURES + 1)
    scene = Scene(*polls)
    scene.server.error = NoAnswer("it died meanwhile")
    for _ in polls:
        scene.supervisor.step()
    assert scene.server.done == ["reload classify", "restart"] * (MAX_FAILURES + 1)


def test_a_server_that_dies_before_it_is_ready_is_given_up():
    scene = Scene(*[[Failure(SERVER, "it was killed by SIGSEGV")] for _ in range(MAX_FAILURES + 1)])
    scene.server.restart_error = NoAnswer("it died meanwhile")
    for _ in range(MAX_FAILURES):
        scene.supervisor.step()
    with pytest.raises(
        RAdapterError, match="tritonserver died: it was killed by SIGSEGV; it has not become ready"
    ):
        scene.supervisor.step()


def test_what_runs_beside_the_server_is_given_up_where_it_dies_at_once_each_time():
    beside = Sidecar(None, *["it ended by itself with status 2"] * MAX_FAILURES)
    scene = Scene(beside=[beside])
    for _ in range(MAX_FAILURES):
        scene.supervisor.step()
    assert (beside.starts, scene.server.done) == (MAX_FAILURES - 1, [])
    assert scene.said[:2] == [
        f"{GATEWAY} died: it ended by itself with status 2; starting it again",
        f"{GATEWAY} is back after 0.0 s",
    ]
    with pytest.raises(
        RAdapterError, match=f"{GATEWAY} died: it ended by itself with status 2; it has not"
    ):
        scene.supervisor.step()


def test_what_runs_beside_the_server_for_a_while_is_never_given_up():
    beside = Sidecar(*["it was killed"] * 20)
    scene = Scene(beside=[beside])
    for _ in range(20):
        scene.clock.sleep(STEADY_SECONDS)
        scene.supervisor.step()
    assert beside.starts == 20


class Asked:
    """A control that answers what a test says, or not at all."""

    def __init__(self, **says: Answer) -> None:
        self.says = says
        self.asked: list[str] = []

    def ask(self, path: str, body: object = None, *, timeout: float = 1.0) -> Answer:
        self.asked.append(path)
        answer = self.says.get("health" if body is None else path.split("/")[1])
        if answer is None:
            raise NoAnswer("none")
        return answer


FINE = Answer(200, {})
REFUSED = Answer(400, {"error": "[no_labels] ..."})
BROKEN = Answer(500, {"error": "why"})


class AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, function, /, *args, **kwargs):
        answer: Future[Any] = Future()
        answer.set_result(function(*args, **kwargs))
        return answer


def stepped(control: Asked, busy: float = 0.0) -> list[list[str]]:
    """What a probe finds in five steps, TIMEOUT_SECONDS apart: it asks in steps 2 and 4, and judges
    after each.

    Args:
        control: answers it.
        busy: seconds of processor time used in TIMEOUT_SECONDS.
    """
    clock = FakeClock()
    asking = Probe(
        control,  # type: ignore[arg-type]
        lambda _: round(clock.now / TIMEOUT_SECONDS) * busy,
        clock=clock,
        threads=AtOnce(),  # type: ignore[arg-type]
    )
    found = []
    for _ in range(5):
        clock.sleep(TIMEOUT_SECONDS)
        found.append(asking.step(["classify", "segment"]))
    return found


NOTHING: list[list[str]] = [[]] * 5


@pytest.mark.parametrize(
    "answer", [FINE, REFUSED, BROKEN, Answer(503, {"error": "Exceeds maximum queue size"})]
)
def test_whatever_a_task_answers_it_lives(answer):
    control = Asked(health=FINE, classify=answer, segment=REFUSED)
    assert stepped(control) == NOTHING
    assert set(control.asked) == {"health/live", "models/classify/infer", "models/segment/infer"}


def test_a_task_that_is_silent_twice_is_named():
    assert stepped(Asked(health=FINE, segment=FINE)) == [*NOTHING[:4], ["classify"]]


def test_who_is_silent_but_works_is_busy():
    assert stepped(Asked(), busy=2 * probe.BUSY_SECONDS) == NOTHING
    assert stepped(Asked(), busy=probe.BUSY_SECONDS / 2)[-1] == [SERVER]


def test_before_it_is_ready_every_version_of_every_task_is_asked():
    control = Asked(classify=FINE, segment=REFUSED)
    models = {"classify": [1, 2], "image_encoder": [2], "segment": [2]}
    warm_up(control, models, 5)  # type: ignore[arg-type]
    assert control.asked == [
        f"models/{one}/infer"
        for one in ("classify/versions/1", "classify/versions/2", "segment/versions/2")
    ]
    with pytest.raises(RAdapterError, match="segment version 2 fails: why"):
        warm_up(Asked(classify=FINE, segment=BROKEN), models, 5)  # type: ignore[arg-type]
    with pytest.raises(
        RAdapterError,
        match="segment version 2 did not answer within 5 s; allow more with --timeout",
    ):
        warm_up(Asked(classify=FINE), models, 5)  # type: ignore[arg-type]


def test_control_sends_the_secret_and_reads_the_index():
    ready = {"name": "a", "state": "READY"}
    body = [{**ready, "version": "2"}, {**ready, "version": "1"}]
    with http_server(200, json.dumps(body).encode()) as (url, seen):
        control = Control(url, "key")
        assert control.serving() == {"a": [1, 2]}
        control.load("a b")
        control.unload("a")
    assert [(one[0], one[1]) for one in seen] == [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/a%20b/load"),
        ("POST", "/v2/repository/models/a/unload"),
    ]
    assert {one[2]["radapter-secret"] for one in seen} == {"key"}
    with (
        http_server(400, b'{"error": "failed to load"}') as (url, _),
        pytest.raises(RAdapterError, match="failed to load"),
    ):
        Control(url, "key").load("a")
    with pytest.raises(NoAnswer):
        Control("http://127.0.0.1:9", "key").load("a")
