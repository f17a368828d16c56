"""Number of waiting requests that a model is to reject: written by the server, read by the model's
processes.

Triton's own limits, `max_queue_size` and timeouts, are in no config: a queue with either is not
looked at when a model becomes free, so what waits there waits for the next request, or for half a
second.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from radapter_serve.files import staged
from radapter_serve.process import SURPLUS


class Surplus:
    """Requests that this process must still reject, by a file that the server writes."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._last = b""
        self._left = 0

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


def write(file: Path, number: int, surplus: int) -> None:
    """Let each process of a model reject `surplus` requests; `number` tells this time from one
    with the same surplus. No file means 0.
    """
    if not surplus:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        return
    with staged(file) as path:
        path.write_text(f"{number} {surplus}", encoding="ascii")
