"""The limit of what waits for a model: counted from Triton's metrics, and kept by the processes of
the model.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import urllib3

from radapter_serve.triton.surplus import write

INTERVAL = 0.25  # seconds between two looks
MAX_WAITING = 128  # requests that may wait for a model
MAX_SECONDS = 60.0  # that one of them may wait
_TIMEOUT = 2.0  # seconds for Triton to list its metrics
_LINE = re.compile(
    r'^nv_inference_(pending_request_count|request_success|request_failure)\{(?:[^}]*,)?model="([^"]+)"[^}]*\}'
    r" (\d+)",
    re.MULTILINE,
)


@dataclass
class Counts:
    """Requests of a model.

    Attributes:
        waiting: that no process has begun.
        done: that were answered, since the server began.
    """

    waiting: int = 0
    done: int = 0


def read_counts(metrics: str) -> dict[str, Counts]:
    """The requests of each model, from what Triton's metrics say of all its versions."""
    found: dict[str, Counts] = {}
    for name, model, value in _LINE.findall(metrics):
        counts = found.setdefault(model, Counts())
        if name == "pending_request_count":
            counts.waiting += int(value)
        else:
            counts.done += int(value)
    return found


@dataclass
class Queue:
    """What is known of the queue of one model.

    Args:
        max_waiting: requests that may wait.
        max_seconds: that one may wait.
    """

    max_waiting: int
    max_seconds: float
    _arrived: deque[tuple[float, int]] = field(default_factory=deque)

    def surplus(self, now: float, counts: Counts) -> int:
        """How many of the waiting requests are too many, or have waited too long.

        Args:
            now: seconds of a clock that never goes back.
            counts: at that time; those of the last call were counted earlier.
        """
        arrived = counts.done + counts.waiting
        # Or Triton began to count anew.
        if not counts.waiting or (self._arrived and arrived < self._arrived[-1][1]):
            self._arrived.clear()
        self._arrived.append((now, arrived))
        while len(self._arrived) > 1 and self._arrived[1][0] <= now - self.max_seconds:
            self._arrived.popleft()
        then, old = self._arrived[0]
        overdue = old - counts.done if then <= now - self.max_seconds else 0
        return max(0, counts.waiting - self.max_waiting, min(overdue, counts.waiting))


class Backlog:
    """Limits what waits for each model of a server, from a thread of its own.

    Args:
        url: of Triton's metrics.
        folder: where the processes of the models look; it is there.
        processes: how many processes each model has, whose files are written; each refuses its
            share.
        max_waiting: requests that may wait for a model.
        max_seconds: that one of them may wait.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        processes: Callable[[], Mapping[str, int]],
        *,
        max_waiting: int = MAX_WAITING,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._url = url
        self._folder = folder
        self._processes = processes
        self._limits = (max_waiting, max_seconds)
        self._queues: dict[str, Queue] = {}
        self._number = 0
        self._pool = urllib3.PoolManager(timeout=_TIMEOUT, retries=False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)

    def start(self) -> Backlog:
        """Begin to look."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()
        self._pool.clear()

    def observe(self, counts: Mapping[str, Counts], now: float) -> None:
        """Say of each model what is to be refused.

        Args:
            counts: of the models.
            now: seconds of a clock that never goes back.
        """
        self._number += 1
        for model, processes in self._processes().items():
            queue = self._queues.setdefault(model, Queue(*self._limits))
            surplus = queue.surplus(now, counts.get(model, Counts()))
            write(self._folder / model, self._number, -(-surplus // max(1, processes)))

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                answer = self._pool.request("GET", self._url)
                self.observe(read_counts(answer.data.decode("utf-8", "replace")), time.monotonic())
            except (urllib3.exceptions.HTTPError, OSError):
                continue  # Triton is away or busy, or the folder goes; the supervisor tells
