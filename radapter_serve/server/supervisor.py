"""Keeping a server up: what died is started again, and what dies over and over is given up with its reason."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from radapter_serve.errors import RAdapterError
from radapter_serve.server.control import NoAnswer
from radapter_serve.server.probe import Probe
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.server.watch import SERVER, Death

EVERY = 1.0  # seconds from one look to the next
MOST, WITHIN = 5, 60.0  # restarts of one thing, in so many seconds
LONGEST_PAUSE = 8.0


class Beside(Protocol):
    """Another program that is kept up beside a server."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def died(self) -> str | None:
        """Why it no longer runs; None while it does."""

    def start(self) -> None:
        """Start it again."""


class Supervisor:
    """Looks after a server that runs: starts again what died or no longer answers.

    Args:
        server: that was started.
        say: told in one line what died, why, and that it is back.
        beside: other programs that were started.
    """

    def __init__(self, server: TritonServer, say: Callable[[str], None], beside: Sequence[Beside] = ()) -> None:
        self._server, self._say = server, say
        self._beside = {one.name: one for one in beside}
        self._probe = Probe(server.control, server.ticks)
        self._restarts: defaultdict[str, deque[float]] = defaultdict(deque)

    def run(self) -> None:
        """Look after the server until an exception ends it, such as that of a signal.

        Raises:
            RAdapterError: something died over and over.
        """
        while True:
            self.step()
            time.sleep(EVERY)

    def step(self) -> None:
        """Look once, and start again what died.

        Raises:
            RAdapterError: it died over and over.
        """
        deaths = self._server.deaths()
        for name in [] if deaths else self._probe.step(self._server.models):
            self._server.kill(name)
            deaths.append(Death(name, "it no longer answered, so it was killed"))
        if any(death.name == SERVER for death in deaths):
            deaths = [death for death in deaths if death.name == SERVER]  # which brings its models back
        deaths += [Death(name, why) for name, one in self._beside.items() if (why := one.died())]
        for death in deaths:
            self._mend(death)

    def _mend(self, death: Death) -> None:
        pause = self._pause(death)
        self._say(f"{death}; starting it again" + (f" in {pause:g} s" if pause else ""))
        time.sleep(pause)
        began = time.monotonic()
        try:
            if death.name == SERVER:
                self._server.restart()
            elif death.name in self._beside:
                self._beside[death.name].start()
            else:
                self._server.reload(death.name)
        except NoAnswer:
            return  # the server died or froze meanwhile: the next look tells
        except RAdapterError as error:
            self._mend(Death(death.name, f"it could not be started again: {error}", death.version))
            return
        self._probe.forget()
        self._say(f"{death.name} is back after {time.monotonic() - began:.1f} s")

    def _pause(self, death: Death) -> float:
        """Seconds to wait before the restart: none at first, then twice as many each time."""
        now, times = time.monotonic(), self._restarts[death.name]
        while times and now - times[0] > WITHIN:
            times.popleft()
        if len(times) >= MOST:
            raise RAdapterError(
                f"{death}; it was started again {MOST} times within {WITHIN:g} s, so radapter-serve gives up; "
                "all messages of the server: radapter-serve --verbose"
            )
        times.append(now)
        return 0.0 if len(times) == 1 else min(LONGEST_PAUSE, 2.0 ** (len(times) - 2))
