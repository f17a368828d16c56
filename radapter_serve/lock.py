"""One writer of a folder at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from radapter_serve.errors import RAdapterError


@contextlib.contextmanager
def lock(folder: Path, writer: str, *, wait: bool = False) -> Iterator[None]:
    """Keep this user's other writers out of a folder, which is made if it is missing.

    `writer` names the commands that write such a folder, for the error. `wait` waits for another
    writer instead of raising it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder, wait=wait))
        except filelock.Timeout:
            raise RAdapterError(f"another {writer} is writing {folder}; wait for it") from None
        yield


@contextlib.contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder; a killed program lets go of it. Raises `filelock.Timeout` if
    another one holds it.

    Its file is in the folder for temporary files: Windows renames no folder with an open file in
    it, and a folder that is exported or published holds nothing but its own files.
    """
    key = os.fsencode(f"{Path.home()}\0{folder.resolve()}")
    name = f"radapter-{hashlib.sha256(key).hexdigest()[:32]}.lock"
    file = Path(tempfile.gettempdir()) / name
    held = filelock.FileLock(file, thread_local=False)
    held.acquire(blocking=wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it on release
            file.unlink()
        held.release()
