"""What a server's processes are, and what is left of them: a folder in /tmp and files in /dev/shm,
both of one name.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.errors import RAdapterError
from radapter_serve.lock import hold

FOLDER_PREFIX = "radapter-serve-"
_LAUNCHER = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])"""


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """A command as a child that is killed when this process (more exactly: the thread that starts
    it) ends.

    Asked to stop by SIGTERM, it would keep its ports for as long as a caller keeps a connection
    open. Only Linux can do this; elsewhere it is the command as it is.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


def shm_prefix(folder: Path) -> str:
    """How a server's files in /dev/shm begin: as its folder is called."""
    return folder.name.replace("-", "_") + "_"


def hide_shared_memory(folder: Path) -> None:
    """Remove the names of a server's files in /dev/shm: its processes keep them open, and no
    other can open them.
    """
    for file in Path("/dev/shm").glob(f"{shm_prefix(folder)}*"):
        file.unlink(missing_ok=True)


def hide_argument(pid: int, secret: str) -> None:
    """Write spaces over a secret in the command line of a child, which has read it and which every
    user can look at.

    Where the kernel does not let a parent do this, the secret stays there.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        # 48th and 49th of proc_pid_stat(5): where the arguments begin and end; the 2nd, a name, may
        # hold spaces
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start = int(fields[45])
        end = int(fields[46])
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(secret.encode(), b" " * len(secret)))


def remove(folder: Path) -> None:
    """Remove a server's folder and what it left in /dev/shm."""
    hide_shared_memory(folder)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def server_folder() -> Iterator[Path]:
    """A folder for a server, which only its owner can read, locked while the server lives; it is
    removed at the end.

    Raises:
        RAdapterError: the folder for temporary files can't be written.
    """
    remove_leftovers()
    with disk_errors():
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    let_go = hold(folder)
    try:
        with disk_errors():
            (folder / "models").mkdir()  # from now on, who is not locked is left over
        yield folder
    finally:
        remove(folder)
        let_go()


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Say what to do where the folder for temporary files can't be written."""
    try:
        yield
    except OSError as error:
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise RAdapterError(
            f"cannot write into {tempfile.gettempdir()}: {why}; free some space, or set TMPDIR to"
            " another"
        ) from None


def remove_leftovers(parent: Path | None = None) -> None:
    """Remove what servers left whose process was killed: its lock on the folder went with it.

    Args:
        parent: folder of the servers' folders; the one for temporary files if None.
    """
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{FOLDER_PREFIX}*"):
        if not (folder / "models").is_dir():  # just made, and not locked yet
            continue
        with contextlib.suppress(OSError):  # another's, or in use
            let_go = hold(folder)
            try:
                remove(folder)
            finally:
                let_go()


STOPPED = "a signal had stopped it, so it was killed"


@dataclass(frozen=True)
class Process:
    """A process as the kernel sees it now.

    Attributes:
        state: one letter: "Z" is dead and not yet collected, "T" is stopped by a signal.
        ticks: of the processor's time that it has used, 100 a second.
        status: how it ended, as `os.waitpid` gives it; 0 while it runs.
        argument: the first argument of its command line.
    """

    state: str
    ticks: int = 0
    status: int = 0
    argument: str = ""

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process of a number.

        Raises:
            OSError: there is none.
        """
        # Counted from the state on, which is field 3: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        argument = arguments[1].decode(errors="replace") if len(arguments) > 1 else ""
        return cls(fields[0], int(fields[11]) + int(fields[12]), int(fields[49]), argument)

    @property
    def model(self) -> tuple[str, int] | None:
        """Name and version of the model that it runs: its argument is
        .../MODEL/VERSION/model.py.
        """
        found = re.search(r"([^/]+)/(\d+)/[^/]+$", self.argument)
        return (found[1], int(found[2])) if found else None


def children(parent: int) -> dict[int, Process]:
    """The processes that `parent` started, by their numbers."""
    found = {}
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads and processes come and go
            for pid in map(int, task.read_text().split()):
                found[pid] = Process.of(pid)
    return found


def how_it_ended(code: int, *, short_of_memory: bool = False) -> str:
    """Why a process died, for people.

    Args:
        code: its status, or minus the number of the signal that killed it.
        short_of_memory: whether the kernel killed processes for want of memory at that time.
    """
    if code == -signal.SIGKILL and short_of_memory:
        return "the kernel killed it, because memory ran out"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it ended by itself with status {code}"


def killed_for_memory() -> int:
    """How many processes the kernel of this machine has killed for want of memory."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
