"""Keeps a server up: starts again what died, gives up what never becomes ready."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from radapter_serve.errors import RAdapterError
from radapter_serve.process import SYSTEM, Clock
from radapter_serve.server.control import NoAnswer
from radapter_serve.server.probe import Probe
from radapter_serve.server.watch import SERVER, Failure

if TYPE_CHECKING:
    from radapter_serve.server.triton_server import TritonServer

INTERVAL_SECONDS = 1.0  # from one look to the next
WINDOW_SECONDS = 60.0  # starts within this time lengthen the next pause
MAX_PAUSE_SECONDS = 8.0
MAX_FAILURES = 5  # starts in a row that made nothing ready
STEADY_SECONDS = 10.0  # after which a sidecar that still runs counts as ready


class Sidecar(Protocol):
    """Another program that is supervised together with a server."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def died(self) -> str | None:
        """Why it no longer runs; None while it does."""

    def start(self) -> None:
        """Start it again."""


@dataclass
class _History:
    """Starts of one program: when they were, how many of the last ones failed in a row, and since
    when it is up.
    """

    starts: deque[float] = field(default_factory=deque)
    failures: int = 0
    up_since: float = -math.inf


class Supervisor:
    """Starts again what died or no longer answers, with pauses that grow where it dies often.

    A program that becomes ready is started again for ever; one that does not in `MAX_FAILURES`
    starts in a row is given up. `say` takes one line for each death and each return.
    """

    def __init__(
        self,
        server: TritonServer,
        say: Callable[[str], None],
        sidecars: Sequence[Sidecar] = (),
        *,
        clock: Clock = SYSTEM,
        probe: Probe | None = None,
    ) -> None:
        self._server = server
        self._say = say
        self._sidecars = {sidecar.name: sidecar for sidecar in sidecars}
        self._clock = clock
        self._probe = probe or Probe(server.control, server.cpu_seconds, clock=clock)
        self._histories: defaultdict[str, _History] = defaultdict(_History)
        for name in self._sidecars:
            self._histories[name].up_since = clock.monotonic()

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
        for name, sidecar in self._sidecars.items():
            if (why := sidecar.died()) is not None:
                failures.append(Failure(name, why))
        for failure in failures:
            self._start_again(failure)

    def _start_again(self, failure: Failure) -> None:
        name = failure.name
        history = self._histories[name]
        if name in self._sidecars:
            steady = self._clock.monotonic() - history.up_since >= STEADY_SECONDS
            history.failures = 0 if steady else history.failures + 1
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
                elif name in self._sidecars:
                    self._sidecars[name].start()
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

        history.up_since = self._clock.monotonic()
        for other, past in self._histories.items():
            # With tritonserver all its models are ready; of a sidecar, time will tell.
            if other not in self._sidecars and name in (SERVER, other):
                past.failures = 0
        self._probe.forget()
        self._say(f"{name} is back after {history.up_since - began:.1f} s")
