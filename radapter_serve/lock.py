"""One writer of a folder at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class NoLocks(OSError):
    """A file system without locks."""


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
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(hold(folder, wait=wait))
        except BlockingIOError:
            raise RAdapterError(f"another {writer} is writing {folder}; wait for it") from None
        except NoLocks:
            pass
        yield


def hold(folder: Path, *, wait: bool = False) -> Callable[[], None]:
    """Lock a folder, which is there. A killed program lets go of it.

    Args:
        folder: to be locked.
        wait: for another program that holds it.

    Returns:
        Lets go of it.

    Raises:
        BlockingIOError: another program holds it.
        NoLocks: its file system has none.
        OSError: it can't be opened.
    """
    if fcntl is None:
        return _hold_file(folder, wait)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        raise NoLocks(*error.args) from None
    return partial(os.close, handle)


def _hold_file(folder: Path, wait: bool) -> Callable[[], None]:
    """A folder can't be locked on Windows, nor renamed while a file in it is open: a file elsewhere
    stands for it.
    """
    import filelock

    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    held = filelock.FileLock(Path(tempfile.gettempdir()) / f"radapter-{name}.lock")
    try:
        held.acquire(blocking=wait)
    except filelock.Timeout:
        raise BlockingIOError from None
    return held.release
