"""What all callers of the gateway share: a limit on concurrent requests, with a short queue, a
memory budget for bodies, and the threads that read large ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from radapter_serve.gateway.errors import overloaded


class ConcurrencyLimit:
    """How many requests run at once, and how many may wait; one more is refused."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._free = asyncio.Semaphore(max_running)
        self.running = 0
        self.waiting = 0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait until a request may run, and count it as running."""
        if self._free.locked() and self.waiting >= self._max_waiting:
            raise overloaded(
                f"{self._max_running} requests run and {self._max_waiting} wait; try again in a"
                " moment"
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()


class MemoryBudget:
    """Bytes of bodies that are held at once, so that many large requests cannot take all memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    def acquire(self, size: int) -> None:
        """Hold so many bytes more, or raise `Refused` where there is no room for them."""
        if self.held + size > self.max_bytes:
            raise overloaded(
                "the requests under way take all memory that is set apart for them; try again in a"
                " moment"
            )
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size

    @contextlib.contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """Yields `acquire` for one request, whose bytes are released at the end of the block."""
        held = 0

        def acquire(size: int) -> None:
            nonlocal held
            self.acquire(size)
            held += size

        try:
            yield acquire
        finally:
            self.release(held)


class Aside:
    """A thread for work that would keep the event loop from its turns, for a request at a time."""

    def __init__(self, name: str) -> None:
        self._free = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
        """Yields what calls a function in the thread, once others have had their turn."""
        # Who waits for the lock, and not in the queue of the thread, holds nothing once it leaves.
        async with self._free:
            yield functools.partial(asyncio.get_running_loop().run_in_executor, self._thread)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
