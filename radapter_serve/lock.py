"""One writer of a folder at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def lock(folder: Path, writer: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other writers out of a folder, which is made if it is missing.

    `writer` names the commands that write such a folder, for the error. `wait` waits for another
    writer instead of raising it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder, wait=wait))
        except BlockingIOError:
            raise RAdapterError(f"another {writer} is writing {folder}; wait for it") from None
        yield


@contextlib.contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, also against other users and containers; a killed program lets go
    of it. Raises `BlockingIOError` if another program holds it.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:
                pass  # a file system without locks
        else:
            # Windows locks no folder, and renames none with an open file in it.
            import filelock

            name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
            held = filelock.FileLock(Path(tempfile.gettempdir()) / f"radapter-{name}.lock")
            try:
                stack.enter_context(held.acquire(blocking=wait))
            except filelock.Timeout:
                raise BlockingIOError from None
        yield
