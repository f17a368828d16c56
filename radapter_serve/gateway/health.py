"""Whether every task answers: ready means answers."""

from __future__ import annotations

import asyncio

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    INTERNAL_ERROR,
    RESTARTING,
    SERVER_STOPPING,
    TIMED_OUT,
)
from radapter_serve.gateway.errors import SERVER_UNAVAILABLE, UNKNOWN_MODEL, Refused
from radapter_serve.gateway.requests import Inference
from radapter_serve.gateway.upstream import SHORT_TIMEOUT, Upstream
from radapter_serve.release.release import TASKS
from radapter_serve.tasks.probes import PROBES

FRESH = 5.0  # seconds for which an answer proves that a task answers
# Other refusals are answers, such as that a release has no patch encoder.
_FAILED = {
    ENCODER_FAILED,
    INTERNAL_ERROR,
    RESTARTING,
    SERVER_STOPPING,
    SERVER_UNAVAILABLE,
    TIMED_OUT,
    UNKNOWN_MODEL,
}


class Health:
    """Asks each task for something tiny, unless it has answered somebody a moment ago."""

    def __init__(self, upstream: Upstream, clock: Clock = SYSTEM) -> None:
        self._upstream = upstream
        self._clock = clock
        self._answered = dict.fromkeys(TASKS, -FRESH)
        self._asking = asyncio.Lock()
        self._failed: tuple[float, str | None] = -FRESH, None

    def answered(self, task: str) -> None:
        """Notes that a task has just answered a caller."""
        self._answered[task] = self._clock.monotonic()

    async def trouble(self) -> str | None:
        """Why not all tasks answer; None where they do. Whoever asks in the same seconds gets the
        same answer.
        """
        async with self._asking:
            when, why = self._failed
            now = self._clock.monotonic()
            if why is not None and now - when < FRESH:
                return why
            stale = [task for task, last in self._answered.items() if now - last >= FRESH]
            troubles = [why for why in await asyncio.gather(*map(self._ask, stale)) if why]
            self._failed = self._clock.monotonic(), troubles[0] if troubles else None
            return self._failed[1]

    async def _ask(self, task: str) -> str | None:
        try:
            if not await self._upstream.ready(task):
                return f"{task} is not ready"
            await self._upstream.infer(probe(task), SHORT_TIMEOUT)
        except Refused as error:
            if error.code in _FAILED:
                return f"{task} does not answer"
        self.answered(task)
        return None


def probe(task: str) -> Inference:
    """The smallest request that goes all the way through a task."""
    return Inference(task, "", dict(PROBES[task]))
