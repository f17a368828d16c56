"""Keeping a server up: what died is started again, and what never becomes ready is given up."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.errors import RAdapterError
from radapter_serve.server.control import NoAnswer
from radapter_serve.server.watch import SERVER, Failure

INTERVAL_SECONDS = 1.0  # from one look to the next
WINDOW_SECONDS = 60.0  # starts within this time make the next pause longer
MAX_PAUSE_SECONDS = 8.0
MAX_FAILURES = 5  # starts, one after the other, that made nothing ready
STEADY_SECONDS = 10.0  # after which a program that still runs counts as ready


class Supervised(Protocol):
    """What a supervisor asks of a server."""

    @property
    def models(self) -> Collection[str]:
        """Those that it serves."""

    def failures(self) -> list[Failure]:
        """What has died since this was last asked."""

    def kill(self, name: str) -> None:
        """End the processes of a model, or tritonserver."""

    def reload(self, model: str) -> None:
        """Start the processes of a model again, and wait until it is ready."""

    def restart(self) -> None:
        """Start tritonserver again, and wait until it is ready."""


class Sidecar(Protocol):
    """Another program that is supervised together with a server."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def died(self) -> str | None:
        """Why it no longer runs; None while it does."""

    def start(self) -> None:
        """Start it again."""


class Asking(Protocol):
    """What finds models that live and do not answer."""

    def step(self, models: Collection[str]) -> list[str]:
        """Those that no longer answer."""

    def forget(self) -> None:
        """Begin anew."""


@dataclass
class _History:
    """What is known of one thing's starts.

    Attributes:
        starts: when they were.
        failures: how many of the last ones, one after the other, made nothing ready.
        up_since: when the last one was done.
    """

    starts: deque[float] = field(default_factory=deque)
    failures: int = 0
    up_since: float = -math.inf


class Supervisor:
    """Looks after a server that runs: starts again what died or no longer answers.

    What becomes ready is started again for ever, with pauses that grow where it dies often. What
    does not become ready in `MAX_FAILURES` starts, one after the other, is given up.

    Args:
        server: that was started.
        say: told in one line what died, why, and that it is back.
        sidecars: other programs that were started.
        clock: tells the time and waits.
        probe: asks the models.
    """

    def __init__(
        self,
        server: Supervised,
        say: Callable[[str], None],
        sidecars: Sequence[Sidecar] = (),
        *,
        clock: Clock = SYSTEM,
        probe: Asking,
    ) -> None:
        self._server = server
        self._say = say
        self._sidecars = {one.name: one for one in sidecars}
        self._clock = clock
        self._probe = probe
        self._histories: defaultdict[str, _History] = defaultdict(_History)
        for name in self._sidecars:
            self._histories[name].up_since = clock.monotonic()

    def run(self) -> None:
        """Look after the server until an exception ends it, such as that of a signal.

        Raises:
            RAdapterError: something never became ready.
        """
        while True:
            self.step()
            self._clock.sleep(INTERVAL_SECONDS)

    def step(self) -> None:
        """Look once, and start again what died.

        Raises:
            RAdapterError: it never became ready.
        """
        failures = self._server.failures()
        if not failures:
            for name in self._probe.step(self._server.models):
                self._server.kill(name)
                failures.append(Failure(name, "it no longer answered, so it was killed"))
        if any(failure.name == SERVER for failure in failures):
            # Which brings its models back.
            failures = [failure for failure in failures if failure.name == SERVER]
        for name, one in self._sidecars.items():
            if (why := one.died()) is not None:
                failures.append(Failure(name, why))
        for failure in failures:
            self._mend(failure)

    def _mend(self, failure: Failure) -> None:
        history = self._histories[failure.name]
        if failure.name in self._sidecars:
            ready = self._clock.monotonic() - history.up_since >= STEADY_SECONDS
            history.failures = 0 if ready else history.failures + 1
        while True:
            if history.failures >= MAX_FAILURES:
                raise RAdapterError(
                    f"{failure}; it has not become ready in {MAX_FAILURES} starts, so"
                    " radapter-serve gives up; once that is mended, start it again, with all its"
                    " messages: radapter-serve --verbose"
                )
            pause = self._pause(history)
            self._say(f"{failure}; starting it again" + (f" in {pause:g} s" if pause else ""))
            self._clock.sleep(pause)
            began = self._clock.monotonic()
            try:
                self._start(failure.name)
            except NoAnswer:
                history.failures += 1
                return  # the server died or froze meanwhile: the next look tells
            except RAdapterError as error:
                history.failures += 1
                failure = Failure(
                    failure.name, f"it could not be started again: {error}", failure.version
                )
                continue
            break
        history.up_since = self._clock.monotonic()
        self._ready(failure.name)
        self._probe.forget()
        self._say(f"{failure.name} is back after {history.up_since - began:.1f} s")

    def _start(self, name: str) -> None:
        if name == SERVER:
            self._server.restart()
        elif name in self._sidecars:
            self._sidecars[name].start()
        else:
            self._server.reload(name)

    def _ready(self, name: str) -> None:
        """A start is done: with tritonserver, all its models are ready; of a sidecar,
        time will tell.
        """
        for other, history in self._histories.items():
            if other not in self._sidecars and name in (SERVER, other):
                history.failures = 0

    def _pause(self, history: _History) -> float:
        """Seconds to wait before the next start: none at first, then twice as many each time."""
        now = self._clock.monotonic()
        while history.starts and now - history.starts[0] > WINDOW_SECONDS:
            history.starts.popleft()
        history.starts.append(now)
        again = len(history.starts) - 1
        return min(MAX_PAUSE_SECONDS, 2.0 ** (again - 1)) if again else 0.0
