"""Requests under load: closed, where callers wait for their answers, and open, where requests come
when they come.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from radapter_client import RAdapterClientError

PERCENTILES = (50, 90, 95, 99)

# Sends one request; the number, which is another one each time, lets it be different from those
# before.
Send = Callable[[int], Awaitable[object]]
TOO_MANY = "not sent: too many requests in flight"


@dataclass(frozen=True)
class Closed:
    """Closed loop: callers that send their next request when the last one is answered.

    A slow server gets fewer requests, so that its latencies say nothing about users who do not wait
    for each other.
    """

    callers: int

    def __str__(self) -> str:
        return f"{self.callers} caller{'s' if self.callers > 1 else ''}"


@dataclass(frozen=True)
class Open:
    """Open loop: requests at random times (a Poisson process), however long the answers take.

    Latency counts from the time at which a request was due, so that a server that falls behind
    can't hide it.

    Args:
        rate: requests a second, above 0.
        at_most: requests under way at once; those above it are not sent, and count as errors.
        seed: of the times.
    """

    rate: float
    at_most: int = 256
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.rate:g}/s"


@dataclass
class Measured:
    """The latencies of answered requests in seconds, the errors by kind, and the seconds from the
    first request to the last answer.
    """

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentiles(self, *wanted: float) -> list[float]:
        """Latencies in seconds at these percentiles, 0 to 100; NaN where nothing was answered."""
        if not self.latencies:
            return [float("nan")] * len(wanted)
        return [float(value) for value in np.percentile(self.latencies, wanted)]


async def measure(send: Send, load: Closed | Open, seconds: float) -> Measured:
    """Send requests for some seconds, wait for the answers, and count the client's errors."""
    measured = Measured()
    numbers = itertools.count()
    start = time.perf_counter()
    if isinstance(load, Closed):
        callers = (_caller(send, numbers, measured, start + seconds) for _ in range(load.callers))
        await asyncio.gather(*callers)
    else:
        await _arrivals(send, numbers, measured, load, start, seconds)
    measured.seconds = time.perf_counter() - start
    return measured


async def _caller(send: Send, numbers: Iterator[int], measured: Measured, end: float) -> None:
    now = time.perf_counter()
    while now < end:
        await _one(send, next(numbers), measured, due=now)
        now = time.perf_counter()


async def _arrivals(
    send: Send, numbers: Iterator[int], measured: Measured, load: Open, start: float, seconds: float
) -> None:
    under_way: set[asyncio.Task[None]] = set()
    pauses = np.random.default_rng(load.seed)
    due = start + pauses.exponential(1 / load.rate)
    while due < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if len(under_way) >= load.at_most:
            measured.errors[TOO_MANY] += 1
        else:
            task = asyncio.ensure_future(_one(send, next(numbers), measured, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        due += pauses.exponential(1 / load.rate)
    await asyncio.gather(*under_way)


async def _one(send: Send, number: int, measured: Measured, due: float) -> None:
    try:
        await send(number)
    except RAdapterClientError as error:
        code = f" [{error.code}]" if error.code else ""
        measured.errors[f"{type(error).__name__}{code}"] += 1
        # A caller that is refused at once must not spend the machine on being refused.
        await asyncio.sleep(0.01)
    else:
        measured.latencies.append(time.perf_counter() - due)
