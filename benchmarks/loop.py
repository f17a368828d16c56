"""Requests under load, closed, where callers wait for their answers, and open, where requests come
when they come; and the stages of a request's time by Triton's statistics.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import urllib.request
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
    """

    rate: float  # requests per second, above 0
    # requests under way at once; those above it are not sent, and count as errors
    at_most: int = 256
    seed: int = 0  # of the times

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


# By model: requests, batches, and nanoseconds of requests, in all, in queue and in compute.
Totals = dict[str, dict[str, float]]
COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Stages:
    """Mean times of a request, in milliseconds."""

    network: float  # the rest of the client's time: encoding, the way there and back, decoding
    queue: float  # waiting for the task and its encoder
    task: float  # decoding, resizing or tokenizing, and the hand-over to the encoder
    encoder: float

    @classmethod
    def between(
        cls, task: str, before: Totals, after: Totals, seconds: float, requests: int
    ) -> Stages:
        """Compare the server's totals before and after requests of a task, of `seconds` in all."""

        def more(model: str, kind: str) -> float:
            return after[model][kind] - before.get(model, {}).get(kind, 0)

        def mean(model: str, kind: str) -> float:
            """Return ms of a request of the task, or of a batch of it for a model that it calls."""
            per = more(task, "count" if model == task else "executions")
            return more(model, kind) / per / 1e6 if per else 0.0

        total = seconds / requests * 1e3
        called = [model for model in after if model != task] if task in after else []
        encoder = sum(mean(model, "compute") for model in called if model.endswith("_encoder"))
        waiting = sum(mean(model, "queue") for model in called)
        queue, work = (mean(task, kind) if task in after else 0.0 for kind in ("queue", "compute"))
        # The task waits for the models that it calls, so its time includes theirs.
        in_task = max(0.0, work - encoder - waiting)
        network = max(0.0, total - queue - waiting - in_task - encoder)
        return cls(network, queue + waiting, in_task, encoder)


def read_totals(url: str) -> Totals:
    """Read a server's totals since its start, by model, over the model's versions."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    totals: Totals = {}
    with opener.open(f"{url}/v2/models/stats") as response:
        models = json.load(response)["model_stats"]
    for model in models:
        counters = model["inference_stats"]
        total = totals.setdefault(
            model["name"], {"count": 0, "executions": 0, "all": 0, "queue": 0, "compute": 0}
        )
        total["count"] += counters["success"]["count"]
        total["executions"] += model["execution_count"]
        total["all"] += counters["success"]["ns"]
        total["queue"] += counters["queue"]["ns"]
        total["compute"] += sum(counters[kind]["ns"] for kind in COMPUTE)
    return totals
