"""`Upstream`: what the gateway asks, which is Triton or an engine in this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from radapter_client import Reply
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    INTERNAL_ERROR,
    RESTARTING,
    SERVER_STOPPING,
    TIMED_OUT,
)
from radapter_serve.gateway.errors import SERVER_UNAVAILABLE, UNKNOWN_MODEL, Refused
from radapter_serve.gateway.kserve import Inference, Model
from radapter_serve.gateway.records import Entry
from radapter_serve.release.release import TASKS
from radapter_serve.tasks.table import PROBES

LOG = logging.getLogger("radapter-gateway")
SHORT_TIMEOUT = 10.0  # seconds for a request that needs no encoder
FRESH = 5.0  # seconds for which an answer proves that a task works
# Codes of a task that does not work. Any other refusal proves that it does.
_FAILED = {
    ENCODER_FAILED,
    INTERNAL_ERROR,
    RESTARTING,
    SERVER_STOPPING,
    SERVER_UNAVAILABLE,
    TIMED_OUT,
    UNKNOWN_MODEL,
}


class Upstream(Protocol):
    """The methods raise nothing but `Refused`; cancelling one cancels its request upstream too."""

    async def infer(self, request: Inference, timeout: float, entry: Entry | None = None) -> Reply:
        """Answer within `timeout` seconds; `entry` has the request's id and trace, and takes the
        steps of an engine.
        """

    async def config(self, model: str, version: str = "") -> Model:
        """Inputs, outputs and releases of a task."""

    async def ready(self, model: str, version: str = "") -> bool: ...

    async def outdated_indexes(self) -> Mapping[str, bool]:
        """Whether another release than the newest made an index, by its name; empty where the
        upstream has metrics for that.
        """

    async def close(self) -> None: ...


class Health:
    """Probes each task, unless it has answered a caller in the last `FRESH` seconds."""

    def __init__(self, upstream: Upstream, now: Callable[[], float] = time.monotonic) -> None:
        self._upstream = upstream
        self._now = now
        self._answered = dict.fromkeys(TASKS, -FRESH)
        self._probing = asyncio.Lock()
        self._failed: tuple[float, str | None] = -FRESH, None

    def answered(self, task: str) -> None:
        """Note that a task has just answered."""
        self._answered[task] = self._now()

    async def trouble(self) -> str | None:
        """Why not all tasks work, or None; one answer for all who ask in the same seconds."""
        async with self._probing:
            when, why = self._failed
            now = self._now()
            if why is not None and now - when < FRESH:
                return why
            stale = [task for task, last in self._answered.items() if now - last >= FRESH]
            troubles = await asyncio.gather(*map(self._probe, stale))
            why = next((trouble for trouble in troubles if trouble), None)
            self._failed = self._now(), why
            return why

    async def _probe(self, task: str) -> str | None:
        try:
            if not await self._upstream.ready(task):
                return f"{task} is not ready"
            await self._upstream.infer(Inference(task, "", dict(PROBES[task])), SHORT_TIMEOUT)
        except Refused as error:
            if error.code in _FAILED:
                return f"{task} does not answer"
        self.answered(task)
        return None
