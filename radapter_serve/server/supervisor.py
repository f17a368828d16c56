"""Keeps a server up: starts again what died or fell silent, gives up what never becomes ready."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import Control, NoAnswer, in_json
from radapter_serve.server.launch import STOPPED, how_it_ended
from radapter_serve.tasks.table import GLANCES

if TYPE_CHECKING:
    from radapter_serve.server.triton_server import TritonServer

SERVER = "tritonserver"
_SAME_TIME = 10.0  # seconds in which a death counts as one for want of memory
_SEGMENTATION_FAULT = (
    "it ended by a segmentation fault, as a request of 4 MiB and more causes without the header "
    "Content-Type: application/json"
)
# Of a supervisor.
INTERVAL_SECONDS = 1.0  # from one look to the next
WINDOW_SECONDS = 60.0  # starts within this time lengthen the next pause
MAX_PAUSE_SECONDS = 8.0
MAX_FAILURES = 5  # starts in a row that made nothing ready
# Of a probe.
PROBE_SECONDS = 5.0  # from an answer to the next request
TIMEOUT_SECONDS = 10.0  # to wait for an answer
MAX_UNANSWERED = 2  # requests in a row
BUSY_SECONDS = 0.1  # processor time before the timeout that shows a model busy, not frozen


@dataclass(frozen=True)
class Failure:
    """A death: the name is a model's or `SERVER`; `why` is a clause about "it"."""

    name: str
    why: str
    version: int | None = None

    def __str__(self) -> str:
        if self.name == SERVER:
            return f"{self.name} died: {self.why}"
        version = "" if self.version is None else f" version {self.version}"
        return f"the process of {self.name}{version} died: {self.why}"


class Watch:
    """Looks at a tritonserver and at the processes of its models, its children.

    A death is reported once a look has seen it twice: a process whose model is unloaded is a
    zombie for a moment, too. The whole model is then started again, so later deaths of its
    present processes are not reported.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._models: dict[int, tuple[str, int]] = {}  # name and version by process number
        self._suspects: set[int] = set()
        self._reported: set[int] = set()
        self._kills = killed_for_memory()
        self._starved = -math.inf

    def poll(self) -> list[Failure]:
        """Report what has died since the last look; kill what a signal has stopped, for it holds
        up its callers.
        """
        kills = killed_for_memory()
        if kills > self._kills:
            self._starved = time.monotonic()
        self._kills = kills
        starved = time.monotonic() - self._starved < _SAME_TIME
        if (code := self._process.poll()) is not None:
            why = how_it_ended(code, short_of_memory=starved)
            return [Failure(SERVER, _SEGMENTATION_FAULT if code == -signal.SIGSEGV else why)]

        # Processes that are dead or stopped in this look and were so in the last one.
        states = self._states()
        bad = {psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED}
        suspects = {pid for pid, state in states.items() if state in bad} - self._reported
        certain = sorted(suspects & self._suspects)
        self._suspects = suspects

        failures: dict[tuple[str, int | None], Failure] = {}
        for pid in certain:
            if states[pid] == psutil.STATUS_STOPPED:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                why = STOPPED
            else:
                why = how_it_ended(_exit_code(pid), short_of_memory=starved)
            if pid == self._process.pid:
                failure = Failure(SERVER, why)
            elif pid in self._models:
                name, version = self._models[pid]
                failure = Failure(name, why, version)
            else:  # the model to load again is unknown, so all of them are
                failure = Failure(SERVER, f"process {pid} of it ended: {why}")
            failures[failure.name, failure.version] = failure
        names = {failure.name for failure in failures.values()}
        again = {pid for pid, (name, _) in self._models.items() if name in names}
        self._reported = (self._reported | set(certain) | again) & states.keys()
        return list(failures.values())

    def models(self) -> dict[int, str]:
        """Models of the living processes, by process number; to be asked after models were loaded,
        too, since a zombie no longer says its own.
        """
        states = self._states()
        return {
            pid: name
            for pid, (name, _) in self._models.items()
            if states.get(pid, psutil.STATUS_ZOMBIE) != psutil.STATUS_ZOMBIE
        }

    def cpu_seconds(self, names: Collection[str]) -> float:
        """Processor time that these models, or the server itself, have used."""
        pids = [pid for pid, name in self.models().items() if name in names]
        pids += [self._process.pid] if SERVER in names else []
        total = 0.0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    def kill(self, name: str) -> None:
        """Kill all processes of a model, or the server."""
        if name == SERVER:
            self._process.kill()
            return
        for pid, model in self.models().items():
            if model == name:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _states(self) -> dict[int, str]:
        """States of the server and its children by process number; learns their models."""
        states = {}
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self._process.pid)
            for process in (server, *server.children()):
                with contextlib.suppress(psutil.Error):
                    states[process.pid] = process.status()
                    model = re.search(r"([^/]+)/(\d+)/[^/]+$", "".join(process.cmdline()[1:2]))
                    if model and process is not server:  # a child is a shell for a moment
                        self._models[process.pid] = (model[1], int(model[2]))
        return states


def killed_for_memory() -> int:
    """Number of processes that the kernel of this machine has killed for want of memory."""
    with contextlib.suppress(OSError):
        if kills := re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE):
            return int(kills[1])
    return 0


def _exit_code(pid: int) -> int:
    """Exit status of a zombie, which psutil tells of own children alone: the last field of
    proc_pid_stat(5).
    """
    with contextlib.suppress(OSError, ValueError):
        return os.waitstatus_to_exitcode(int(Path(f"/proc/{pid}/stat").read_text().split()[-1]))
    return 0


@dataclass
class _Asked:
    """One model: when to ask next, the answer that is waited for, the processor time at its
    request, and how many requests in a row got no answer.
    """

    due: float
    answer: Future[bool] | None = None
    used: float = 0.0
    misses: int = 0


class Probe:
    """Finds what lives but does not answer, such as a process that waits for itself.

    A loaded server may leave a request in its queue for long. So silence counts only while nothing
    that could answer, the model or an encoder, computes: `cpu_seconds` gives the processor time of
    models.
    """

    def __init__(
        self,
        control: Control,
        cpu_seconds: Callable[[Collection[str]], float],
        *,
        clock: Clock = SYSTEM,
        threads: Executor | None = None,  # they wait for the answers
        interval: float = PROBE_SECONDS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self._control = control
        self._cpu_seconds = cpu_seconds
        self._clock = clock
        self._interval = interval
        self._timeout = timeout
        self._threads = threads or ThreadPoolExecutor(len(GLANCES) + 1, thread_name_prefix="probe")
        self._asked: dict[str, _Asked] = {}

    def step(self, models: Collection[str]) -> list[str]:
        """Send the requests that are due, without waiting; return the models that no longer
        answer, or `SERVER` alone if it is the server itself.
        """
        silent = [name for name in GLANCES if name in models and self._is_silent(name)]
        return [SERVER] if self._is_silent(SERVER) else silent

    def forget(self) -> None:
        """Begin anew, after something was started again."""
        self._asked.clear()

    def _is_silent(self, name: str) -> bool:
        now = self._clock.monotonic()
        asked = self._asked.setdefault(name, _Asked(now + self._interval))
        answering = [SERVER] if name == SERVER else [name, *ENCODERS]
        if asked.answer is None:
            if now >= asked.due:
                asked.used = self._cpu_seconds(answering)
                asked.answer = self._threads.submit(self._answers, name)
        elif asked.answer.done():
            is_alive = asked.answer.result()
            if not is_alive:
                is_alive = self._cpu_seconds(answering) - asked.used >= BUSY_SECONDS
            asked.misses = 0 if is_alive else asked.misses + 1
            asked.answer = None
            asked.due = now + self._interval
        return asked.misses >= MAX_UNANSWERED

    def _answers(self, name: str) -> bool:
        """Whether any answer comes: even a failure is one of a process that lives."""
        path = "health/live" if name == SERVER else f"models/{name}/infer"
        body = None if name == SERVER else {"inputs": in_json(GLANCES[name])}
        try:
            self._control.ask(path, body, timeout=self._timeout)
        except NoAnswer:
            return False
        return True


@dataclass
class _History:
    """Starts of one program: when they were, and how many of the last ones failed in a row."""

    starts: deque[float] = field(default_factory=deque)
    failures: int = 0


class Supervisor:
    """Starts again what died or no longer answers, with pauses that grow where it dies often.

    A program that becomes ready is started again for ever; one that does not in `MAX_FAILURES`
    starts in a row is given up. `say` takes one line for each death and each return.
    """

    def __init__(
        self,
        server: TritonServer,
        say: Callable[[str], None],
        *,
        clock: Clock = SYSTEM,
        probe: Probe | None = None,
    ) -> None:
        self._server = server
        self._say = say
        self._clock = clock
        self._probe = probe or Probe(server.control, server.cpu_seconds, clock=clock)
        self._histories: defaultdict[str, _History] = defaultdict(_History)

    def run(self) -> None:
        """Look after the server until an exception ends it, such as that of a signal."""
        while True:
            self.step()
            self._clock.sleep(INTERVAL_SECONDS)

    def step(self) -> None:
        """Look once, and start again what died; raise an error if it never becomes ready."""
        failures = self._server.failures()
        if not failures:
            for name in self._probe.step(self._server.models):
                self._server.kill(name)
                failures.append(Failure(name, "it no longer answered, so it was killed"))
        if any(failure.name == SERVER for failure in failures):
            # A restart brings its models back, too.
            failures = [failure for failure in failures if failure.name == SERVER]
        for failure in failures:
            self._start_again(failure)

    def _start_again(self, failure: Failure) -> None:
        name = failure.name
        history = self._histories[name]
        while True:
            if history.failures >= MAX_FAILURES:
                raise RAdapterError(
                    f"{failure}; it has not become ready in {MAX_FAILURES} starts, so"
                    " radapter-serve gives up; once that is mended, start it again, with all its"
                    " messages: radapter-serve --verbose"
                )

            # No pause before the first start of a minute, then twice as long each time.
            now = self._clock.monotonic()
            while history.starts and now - history.starts[0] > WINDOW_SECONDS:
                history.starts.popleft()
            recent = len(history.starts)
            history.starts.append(now)
            pause = min(MAX_PAUSE_SECONDS, 2.0 ** (recent - 1)) if recent else 0.0
            self._say(f"{failure}; starting it again" + (f" in {pause:g} s" if pause else ""))
            self._clock.sleep(pause)

            began = self._clock.monotonic()
            try:
                if name == SERVER:
                    self._server.restart()
                else:
                    self._server.reload(name)
                break
            except NoAnswer:  # the server died or froze meanwhile: the next look finds it
                history.failures += 1
                return
            except RAdapterError as error:
                history.failures += 1
                why = f"it could not be started again: {error}"
                failure = Failure(name, why, failure.version)

        for other, past in self._histories.items():
            if name in (SERVER, other):  # with tritonserver all its models are ready
                past.failures = 0
        self._probe.forget()
        self._say(f"{name} is back after {self._clock.monotonic() - began:.1f} s")
