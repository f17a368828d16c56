"""What the gateway gives to all callers together: places to run in, a short queue, and memory for
bodies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from radapter_serve.gateway.errors import overloaded


class Places:
    """Requests that run at once, and that may wait for it.

    Args:
        most: that run.
        queue: that wait; one more is refused.
    """

    def __init__(self, most: int, queue: int) -> None:
        self._most, self._queue, self._free = most, queue, asyncio.Semaphore(most)
        self.running = self.waiting = 0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place, as soon as one is free.

        Raises:
            Refused: too many wait already.
        """
        if self._free.locked() and self.waiting >= self._queue:
            raise overloaded(
                f"{self._most} requests run and {self._queue} wait; try again in a moment"
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


class Memory:
    """Bytes of bodies that are held at once, so that many large requests cannot take all memory."""

    def __init__(self, most: int) -> None:
        self._most, self.held = most, 0

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            Refused: there is no room for them.
        """
        if self.held + size > self._most:
            raise overloaded(
                "the requests under way take all memory that is set apart for them; try again in a"
                " moment"
            )
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Something to call with the bytes that one request takes, which are given back at the end
        of the block.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self.take(size)
            taken += size

        try:
            yield take
        finally:
            self.give_back(taken)
