"""Keeps a server up: starts again what died or fell silent, gives up what never becomes ready."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.release.repository import ENCODERS
from radapter_serve.server.control import Control, NoAnswer, in_json
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.server.watch import SERVER, Failure
from radapter_serve.tasks.table import GLANCES

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
