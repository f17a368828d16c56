"""Keeps a server up: restarts processes that died or no longer answer."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import Control, NoAnswer, as_json_inputs
from radapter_serve.server.models import full_shared_memory
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.server.watch import SERVER, Death
from radapter_serve.tasks.table import MINIMAL_REQUESTS

# Supervisor
INTERVAL_SECONDS = 1.0  # between checks
WINDOW_SECONDS = 60.0  # starts within this time lengthen the next pause
MAX_PAUSE_SECONDS = 8.0
MAX_FAILURES = 5  # failed starts in a row
# Probe
PROBE_SECONDS = 5.0  # from an answer to the next request
TIMEOUT_SECONDS = 10.0  # to wait for an answer
MAX_UNANSWERED = 2  # requests in a row
BUSY_SECONDS = 0.1  # CPU time within the timeout that shows a model busy, not frozen


@dataclass
class _ModelProbe:
    """The probe of one model; `due` is the time of the next request."""

    due: float
    answer: Future[bool] | None = None  # pending
    used: float = 0.0  # CPU time at the request
    misses: int = 0  # requests in a row without an answer


class Probe:
    """Finds processes that live but do not answer, for example because of a deadlock."""

    def __init__(
        self,
        control: Control,
        cpu_seconds: Callable[[Collection[str]], float],
        *,
        clock: Clock = SYSTEM,
        threads: Executor | None = None,  # to wait for the answers
        interval: float = PROBE_SECONDS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self._control = control
        self._cpu_seconds = cpu_seconds
        self._clock = clock
        self._interval = interval
        self._timeout = timeout
        self._threads = threads or ThreadPoolExecutor(
            len(MINIMAL_REQUESTS) + 1, thread_name_prefix="probe"
        )
        self._probes: dict[str, _ModelProbe] = {}

    def step(self, models: Collection[str]) -> list[str]:
        """Send the requests that are due; return the silent models, or `SERVER` alone."""
        silent = [name for name in MINIMAL_REQUESTS if name in models and self._is_silent(name)]
        return [SERVER] if self._is_silent(SERVER) else silent

    def forget(self) -> None:
        """Forget all requests, after a restart."""
        self._probes.clear()

    def _is_silent(self, name: str) -> bool:
        now = self._clock.monotonic()
        probe = self._probes.setdefault(name, _ModelProbe(now + self._interval))
        answering = [SERVER] if name == SERVER else [name, *ENCODERS]
        if probe.answer is None:
            if now >= probe.due:
                probe.used = self._cpu_seconds(answering)
                probe.answer = self._threads.submit(self._answers, name)
        elif probe.answer.done():
            is_alive = probe.answer.result()
            if not is_alive:  # a loaded server may answer late, but then it computes
                is_alive = self._cpu_seconds(answering) - probe.used >= BUSY_SECONDS
            probe.misses = 0 if is_alive else probe.misses + 1
            probe.answer = None
            probe.due = now + self._interval
        return probe.misses >= MAX_UNANSWERED

    def _answers(self, name: str) -> bool:
        """True if any answer comes: an error shows a living process, too."""
        path = "health/live" if name == SERVER else f"models/{name}/infer"
        body = None if name == SERVER else {"inputs": as_json_inputs(MINIMAL_REQUESTS[name])}
        try:
            self._control.ask(path, body, timeout=self._timeout)
        except NoAnswer:
            return False
        return True


class Supervisor:
    """Restarts models, or the server, that died or no longer answer, with growing pauses."""

    def __init__(
        self,
        server: TritonServer,
        say: Callable[[str], None],
        *,
        clock: Clock = SYSTEM,
        probe: Probe | None = None,
        full: Callable[[], str | None] = full_shared_memory,
    ) -> None:
        self._server = server
        self._say = say
        self._clock = clock
        self._full = full
        self._was_full = False
        self._probe = probe or Probe(server.control, server.cpu_seconds, clock=clock)
        # By model or `SERVER`
        self._starts: defaultdict[str, deque[float]] = defaultdict(deque)
        self._failures: Counter[str] = Counter()  # in a row

    def run(self) -> None:
        """Supervise the server until an exception, such as that of a signal, ends the loop."""
        while True:
            self.step()
            self._clock.sleep(INTERVAL_SECONDS)

    def step(self) -> None:
        """Check once, and restart what died; raises `RAdapterError` after too many failures."""
        why = self._full()
        if why is not None and not self._was_full:
            self._say(why)
        self._was_full = why is not None
        failures = self._server.failures()
        if not failures:
            for name in self._probe.step(self._server.models):
                self._server.kill(name)
                failures.append(Death(name, "it no longer answered, so it was killed"))
        if any(failure.name == SERVER for failure in failures):
            # A restart of the server restarts its models, too.
            failures = [failure for failure in failures if failure.name == SERVER]
        for failure in failures:
            self._start_again(failure)

    def _start_again(self, failure: Death) -> None:
        name = failure.name
        starts = self._starts[name]
        while True:
            if self._failures[name] >= MAX_FAILURES:
                raise RAdapterError(
                    f"{failure}; it has not become ready in {MAX_FAILURES} starts, so"
                    " radapter-serve gives up; once that is mended, start it again, with all its"
                    " messages: radapter-serve --verbose"
                )

            # No pause before the first start within `WINDOW_SECONDS`, then 1 s, doubled each time.
            now = self._clock.monotonic()
            while starts and now - starts[0] > WINDOW_SECONDS:
                starts.popleft()
            pause = min(MAX_PAUSE_SECONDS, 2.0 ** (len(starts) - 1)) if starts else 0.0
            starts.append(now)
            self._say(f"{failure}; starting it again" + (f" in {pause:g} s" if pause else ""))
            self._clock.sleep(pause)
            while self._full() is not None:  # no process starts, and others still answer
                self._clock.sleep(INTERVAL_SECONDS)

            # Start the program, and try again if it does not become ready.
            began = self._clock.monotonic()
            try:
                if name == SERVER:
                    self._server.restart()
                else:
                    self._server.reload(name)
                break
            except NoAnswer:  # the server died or froze meanwhile: the next check finds it
                self._failures[name] += 1
                return
            except RAdapterError as error:
                self._failures[name] += 1
                why = f"it could not be started again: {error}"
                failure = Death(name, why, failure.version)

        del self._failures[name]
        if name == SERVER:  # when tritonserver is ready, so are all its models
            self._failures.clear()
        self._probe.forget()
        self._say(f"{name} is back after {self._clock.monotonic() - began:.1f} s")
