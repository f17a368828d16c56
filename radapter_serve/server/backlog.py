"""Limit of what waits for a model: counted from Triton's metrics, and kept by the processes of the
model.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import urllib3

from radapter_serve.process import SYSTEM
from radapter_serve.server.config import MAX_WAITING
from radapter_serve.triton.surplus import write

INTERVAL_SECONDS = 0.25  # from one look to the next

MAX_SECONDS = 60.0  # that one of them may wait
_LINE = re.compile(
    r'^nv_inference_(pending_request_count|request_success|request_failure)\{(?:[^}]*,)?model="([^"]+)"[^}]*\}'
    r" (\d+)",
    re.MULTILINE,
)


def read_counts(metrics: str) -> dict[str, tuple[int, int]]:
    """Requests of each model in all its versions, from Triton's metrics: how many wait, how many
    were answered since the server began.
    """
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, model, value in _LINE.findall(metrics):
        waiting, done = counts[model]
        if name == "pending_request_count":
            counts[model] = (waiting + int(value), done)
        else:
            counts[model] = (waiting, done + int(value))
    return dict(counts)


@dataclass
class Queue:
    """The queue of one model: how many requests may wait, for how many seconds, and how many had
    arrived at which times.
    """

    max_waiting: int = MAX_WAITING
    max_seconds: float = MAX_SECONDS
    _arrived: deque[tuple[float, int]] = field(default_factory=deque)

    def surplus(self, now: float, waiting: int, done: int) -> int:
        """Number of waiting requests that are too many, or have waited too long, at `now`."""
        arrived = done + waiting
        # An empty queue holds nothing old; a smaller count is that of another Triton.
        if not waiting or (self._arrived and arrived < self._arrived[-1][1]):
            self._arrived.clear()
        self._arrived.append((now, arrived))
        while len(self._arrived) > 1 and self._arrived[1][0] <= now - self.max_seconds:
            self._arrived.popleft()
        then, arrived_then = self._arrived[0]
        overdue = arrived_then - done if then <= now - self.max_seconds else 0
        return max(0, waiting - self.max_waiting, min(overdue, waiting))


class Backlog:
    """A thread that reads Triton's metrics at `url`, and writes into `folder` how many requests
    each process of a model is to reject; `processes` says how many a model has.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        processes: Callable[[], Mapping[str, int]],
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._url = url
        self._folder = folder
        self._processes = processes
        self._queues: dict[str, Queue] = defaultdict(lambda: Queue(max_waiting))
        self._number = 0
        self._pool = urllib3.PoolManager(timeout=2.0, retries=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()
        self._pool.clear()

    def observe(self, counts: Mapping[str, tuple[int, int]], now: float) -> None:
        """Write how many requests each model is to reject, by its counts at `now`."""
        self._number += 1
        for model, processes in self._processes().items():
            surplus = self._queues[model].surplus(now, *counts.get(model, (0, 0)))
            write(self._folder / model, self._number, -(-surplus // max(1, processes)))

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            try:
                answer = self._pool.request("GET", self._url)
                self.observe(
                    read_counts(answer.data.decode("utf-8", "replace")), SYSTEM.monotonic()
                )
            except (urllib3.exceptions.HTTPError, OSError):
                continue  # Triton is away or busy, which the supervisor sees, or the folder goes
