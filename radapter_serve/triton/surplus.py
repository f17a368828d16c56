"""How many of the requests that wait for a model are too many: the server says it, the model's
processes refuse them.

Triton has a limit of its own, `max_queue_size`, and time-outs. But a queue with either is not
looked at when a model becomes free: what waits there waits until the next request comes, or for
half a second. So no config has them. The server counts what waits for each model, and writes into a
file how many each process of it is to refuse.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from radapter_serve.environment import SURPLUS
from radapter_serve.files import staged


class Surplus:
    """What the process of a model has still to refuse.

    Args:
        file: that the server writes; None where no server does.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._last = b""
        self._left = 0

    def heed(self, model: str) -> None:
        """From now on refuse what the server says of this model, if it says anything.

        Args:
            model: that this process has loaded.
        """
        folder = os.environ.get(SURPLUS)
        self._file = Path(folder, model) if folder else None

    def take(self, count: int) -> int:
        """How many of some requests are to be refused, the first ones, which have waited longest.

        Args:
            count: requests that were waiting, 0 or more.

        Returns:
            0 to `count`.
        """
        if self._file is None:
            return 0
        try:
            said = self._file.read_bytes()
        except OSError:  # nothing to refuse
            self._last = b""
            self._left = 0
            return 0
        if said != self._last:
            self._last = said
            self._left = int(said.split()[1])
        refused = min(count, self._left)
        self._left -= refused
        return refused


of_this_process = Surplus()


def write(file: Path, number: int, surplus: int) -> None:
    """Say how many requests each process of a model is to refuse.

    Args:
        file: of the model.
        number: another one each time, for the same surplus may be there again.
        surplus: requests, 0 or more; with 0 the file goes.
    """
    if not surplus:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        return
    with staged(file) as path:
        path.write_text(f"{number} {surplus}", encoding="ascii")
