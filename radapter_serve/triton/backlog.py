"""Limits the requests that wait for a model. The server finds in Triton's metrics how many requests
are too many, and writes the number into a file; the model's processes read it and reject them.

Triton's own limits, `max_queue_size` and timeouts, are in no config: with either, Triton does not
look at the queue when a model becomes free, and requests wait for the next one, or for half a
second.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from radapter_serve.files import write_text
from radapter_serve.process import SURPLUS

INTERVAL_SECONDS = 0.25  # between readings of the metrics
_WAITING = re.compile(
    r'^nv_inference_pending_request_count\{(?:[^}]*,)?model="([^"]+)"[^}]*\} (\d+)', re.MULTILINE
)


class Surplus:
    """Counts the requests that this process must still reject, from the file of a `Backlog`."""

    _file: Path | None = None
    _last = b""
    _left = 0

    def open(self, model: str) -> None:
        """Read the file of this model from now on, if the environment names its folder."""
        folder = os.environ.get(SURPLUS)
        self._file = Path(folder, model) if folder else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Take the turn of all tasks' processes for the block; yields False if another has it."""
        with contextlib.ExitStack() as stack:
            taken = True
            if self._file is not None:
                import fcntl  # here: Windows lacks it

                file = stack.enter_context(self._file.with_name("label-set.turn").open("wb"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    taken = False
            yield taken

    def take(self, count: int) -> int:
        """Return how many of `count` waiting requests, the first ones, to reject."""
        if self._file is None:
            return 0
        try:
            content = self._file.read_bytes()
        except OSError:  # no file: nothing to reject
            content = b"0 0"
        if content != self._last:
            self._last = content
            self._left = int(content.split()[1])
        rejected = min(count, self._left)
        self._left -= rejected
        return rejected


of_this_process = Surplus()


class Backlog:
    """A thread of the server, which reads Triton's metrics, and writes into a file of each model
    how many requests each of its processes must reject.
    """

    def __init__(
        self, url: str, folder: Path, processes: Callable[[], Mapping[str, int]], max_waiting: int
    ) -> None:
        self._url = url
        self._folder = folder
        self._processes = processes
        self._max_waiting = max_waiting
        self._number = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._ended.set()
        self._thread.join()

    def observe(self, metrics: str) -> None:
        """Write the number of requests that each model must reject, given Triton's metrics."""
        waiting: dict[str, int] = defaultdict(int)  # by model, over all its versions
        for model, value in _WAITING.findall(metrics):
            waiting[model] += int(value)

        # No file means nothing to reject. The first number changes each time, so that a process
        # notices the same count again.
        self._number += 1
        for model, processes in self._processes().items():
            surplus = max(0, waiting[model] - self._max_waiting)
            each = -(-surplus // max(1, processes))
            if each:
                write_text(self._folder / model, f"{self._number} {each}")
            else:
                (self._folder / model).unlink(missing_ok=True)

    def _run(self) -> None:
        import urllib3  # here: the processes of models do not need it

        with urllib3.PoolManager(timeout=2.0, retries=False) as pool:
            while not self._ended.wait(INTERVAL_SECONDS):
                # Triton may be down or busy, which is the supervisor's concern, or the folder gone.
                with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
                    text = pool.request("GET", self._url).data.decode("utf-8", "replace")
                    self.observe(text)
