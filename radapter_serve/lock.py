"""One writer of a folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from radapter_serve.errors import RAdapterError


@contextlib.contextmanager
def lock(folder: Path, writer: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other writers out of a folder, which is made where there is none. A killed program lets
    go of it.

    Args:
        folder: to be written.
        writer: what to call the commands that write such a folder, in the message.
        wait: for another one to end, rather than refuse.

    Raises:
        RAdapterError: another one is writing the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _take(handle, f"another {writer} is writing {folder}; wait for it", wait)
        yield
    finally:
        os.close(handle)


def _take(handle: int, message: str, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise RAdapterError(message) from None
    except OSError:
        pass  # a file system without locks
