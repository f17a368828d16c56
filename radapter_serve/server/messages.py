"""What a tritonserver writes, and which line of it says why it failed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from radapter_serve.errors import RAdapterError


class Messages:
    """The messages of a server.

    Args:
        file: that keeps them; None lets them go to this process's stderr.
        where: how a user gets to see all of them, for the report of a failure.
    """

    def __init__(self, file: Path | None, where: str) -> None:
        self._file = file
        self._where = where

    @contextlib.contextmanager
    def open(self, mode: Literal["wb", "ab"]) -> Iterator[IO[bytes] | None]:
        """What a server is to write to; None is this process's stderr.

        Args:
            mode: begins the file, or adds to it.

        Raises:
            RAdapterError: the file cannot be written.
        """
        if self._file is None:
            yield None
            return
        try:
            file = self._file.open(mode)
        except OSError as error:
            raise RAdapterError(f"cannot write the log {self._file}: {error.strerror}") from None
        with file:
            yield file

    def reason(self) -> str:
        """Why the server failed, and where to read the rest."""
        if self._file is None or not self._file.exists():
            return "its messages above say why"
        why = reason(self._file.read_text(encoding="utf-8", errors="replace"))
        return f"{why}; all its messages: {self._where}"


def reason(log: str) -> str:
    """The line of a server's log that says best why it failed: a model that did not load, else the
    last error.
    """
    # Said without a GPU.
    lines = [line for line in log.splitlines() if not re.search("CudaDriver|NVML|DCGM", line)]
    errors = [line for line in lines if re.match(r"[EF]\d{4} ", line)]
    best = (
        [line for line in errors if "failed to load" in line]
        or errors
        or [line for line in lines if line.strip()]
    )
    if not best:
        return "it wrote nothing"
    return re.sub(r"^[EF]\d{4} \S+ +\d+ \S+\] ", "", best[-1]).strip().strip('"')
