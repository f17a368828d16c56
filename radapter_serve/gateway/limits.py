"""Limits: requests at once, memory of bodies, and what one key may ask."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator

from radapter_serve.contract.errors import OVERLOADED
from radapter_serve.gateway.errors import RATE_LIMITED, Refused
from radapter_serve.gateway.keys import Key
from radapter_serve.gateway.records import Entry, milliseconds


class ConcurrencyLimit:
    """Limits the requests that run at once, and those that wait for a place."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._free = asyncio.Semaphore(max_running)
        self.running = 0
        self.waiting = 0

    @contextlib.asynccontextmanager
    async def slot(self, entry: Entry) -> AsyncIterator[None]:
        """Hold a place, or raise `Refused`; the entry gets the milliseconds in the queue and in
        the block.
        """
        asked = time.monotonic()
        if self._free.locked() and self.waiting >= self._max_waiting:
            raise Refused(
                429,
                OVERLOADED,
                f"{self._max_running} requests run and {self._max_waiting} wait; try again in a"
                " moment",
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
            entry.queue_ms = milliseconds(time.monotonic() - asked)
        began = time.monotonic()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
            entry.model_ms = milliseconds(time.monotonic() - began)


class MemoryBudget:
    """Limits the bytes of bodies that are held at once."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that holds so many bytes more until the block ends, or raises `Refused`
        where there is no room.
        """
        leased = 0

        def acquire(size: int) -> None:
            nonlocal leased
            if self.held + size > self.max_bytes:
                raise Refused(
                    429,
                    OVERLOADED,
                    "the requests under way take all memory that is set apart for them; try again"
                    " in a moment",
                )
            self.held += size
            leased += size

        try:
            yield acquire
        finally:
            self.held -= leased


class TokenBucket:
    """Allows `limit` in a period of some seconds, any number if None; full at first."""

    def __init__(self, limit: float | None, period: float, now: Callable[[], float]) -> None:
        self._limit = limit
        self._period = period
        self._now = now
        self._size = max(1.0, limit or 0.0)
        self._left = self._size
        self._updated = now()

    def take(self, count: int = 1) -> float:
        """Take so many and return 0; if there are too few, take none and return the seconds until
        there are enough.
        """
        if self._limit is None:
            return 0.0
        now = self._now()
        self._left += (now - self._updated) * self._limit / self._period
        self._left = min(self._size, self._left)
        self._updated = now
        # A full bucket gives more than it holds, and has a debt afterwards.
        lacking = min(count, self._size) - self._left
        if lacking > 1e-9:  # above the error of rounding
            return lacking * self._period / self._limit
        self._left -= count
        return 0.0


class Quota:
    """Counts the requests and images of a key towards its limits."""

    def __init__(self, key: Key, now: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self._requests = TokenBucket(key.requests_per_second, 1.0, now)
        self._images = TokenBucket(key.images_per_minute, 60.0, now)
        self._running = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs, or raise `Refused`."""
        key = self.key
        if key.at_once is not None and self._running >= key.at_once:
            raise self._refused(f"{key.at_once} requests at once", 1)
        if seconds := self._requests.take():
            raise self._refused(f"{key.requests_per_second:g} requests a second", seconds)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def images(self, count: int) -> None:
        """Count the images of a request, or raise `Refused`."""
        if seconds := self._images.take(count):
            raise self._refused(f"{self.key.images_per_minute:g} images a minute", seconds)

    def _refused(self, allowed: str, seconds: float) -> Refused:
        after = max(1, math.ceil(seconds))
        message = f"the key {self.key.name} may send {allowed}; try again in {after} s"
        return Refused(429, RATE_LIMITED, message, retry_after=after)
