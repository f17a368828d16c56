"""What a server's processes are, and what is left of them: a folder in /tmp and files in /dev/shm, both of one name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

FOLDER_PREFIX = "radapter-serve-"


def shm_prefix(folder: Path) -> str:
    """How a server's files in /dev/shm begin: as its folder is called."""
    return folder.name.replace("-", "_") + "_"


def hide_shared_memory(folder: Path) -> None:
    """Remove the names of a server's files in /dev/shm: its processes keep them open, and nobody else can open them."""
    for file in Path("/dev/shm").glob(f"{shm_prefix(folder)}*"):
        file.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a server's folder and what it left in /dev/shm."""
    hide_shared_memory(folder)
    shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove what servers left whose process was killed: its lock on the folder went with it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        if not (folder / "models").is_dir():  # just made, and not locked yet
            continue
        with contextlib.suppress(OSError):  # another's, or in use
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
            finally:
                os.close(lock)


def children(parent: int) -> dict[int, tuple[str, str]]:
    """State ("Z": dead) and first argument of the processes that `parent` started, by process id."""
    found = {}
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads and processes come and go
            for pid in map(int, task.read_text().split()):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found[pid] = state, arguments[1].decode() if len(arguments) > 1 else ""
    return found
