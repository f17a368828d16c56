"""Limit of what waits for a model: the server counts by Triton's metrics how many requests are too
many, and writes that into a file, by which the processes of the model reject them.

Triton's own limits, `max_queue_size` and timeouts, are in no config: a queue with either is not
looked at when a model becomes free, so what waits there waits for the next request, or for half a
second.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from radapter_serve.files import staged
from radapter_serve.process import SURPLUS

INTERVAL_SECONDS = 0.25  # from one look to the next
_WAITING = re.compile(
    r'^nv_inference_pending_request_count\{(?:[^}]*,)?model="([^"]+)"[^}]*\} (\d+)', re.MULTILINE
)


class Surplus:
    """Requests that this process must still reject, by a file that the server writes."""

    _file: Path | None = None
    _last = b""
    _left = 0

    def open(self, model: str) -> None:
        """Read the file of this model from now on, if a server has set its folder."""
        folder = os.environ.get(SURPLUS)
        self._file = Path(folder, model) if folder else None

    def take(self, count: int) -> int:
        """How many of `count` waiting requests are to be rejected: the first, which have waited
        longest.
        """
        if self._file is None:
            return 0
        try:
            content = self._file.read_bytes()
        except OSError:  # nothing to reject
            content = b"0 0"
        if content != self._last:
            self._last = content
            self._left = int(content.split()[1])
        rejected = min(count, self._left)
        self._left -= rejected
        return rejected


of_this_process = Surplus()


class Backlog:
    """A thread of the server that reads Triton's metrics at `url`, and writes into `folder` how
    many requests each process of a model is to reject; `processes` says how many a model has.
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
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def observe(self, metrics: str) -> None:
        """Write how many requests each model is to reject, by Triton's metrics."""
        waiting: dict[str, int] = defaultdict(int)  # for each model in all its versions
        for model, value in _WAITING.findall(metrics):
            waiting[model] += int(value)

        # No file means that nothing is to be rejected; the number tells this time from one with as
        # many.
        self._number += 1
        for model, processes in self._processes().items():
            surplus = max(0, waiting[model] - self._max_waiting)
            each = -(-surplus // max(1, processes))
            if each:
                with staged(self._folder / model) as path:
                    path.write_text(f"{self._number} {each}", encoding="ascii")
            else:
                (self._folder / model).unlink(missing_ok=True)

    def _run(self) -> None:
        import urllib3  # here: the processes of models do without

        with urllib3.PoolManager(timeout=2.0, retries=False) as pool:
            while not self._ended.wait(INTERVAL_SECONDS):
                # Triton may be away or busy, which the supervisor sees, and the folder may go.
                with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
                    text = pool.request("GET", self._url).data.decode("utf-8", "replace")
                    self.observe(text)
