"""A server's processes, its folder in /tmp and its files in /dev/shm, which share a name."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from radapter_serve.files import disk_errors, hold

FOLDER_PREFIX = "radapter-serve-"
DISK_ADVICE = "free some space, or set TMPDIR to another"
STOPPED = "a signal had stopped it, so it was killed"
_LAUNCHER = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])"""


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """Wrap a command so that, on Linux, it is killed when the thread that starts it ends.

    SIGTERM would leave its ports taken for as long as a caller keeps a connection open.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


def end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Terminate the leader of a process group; kill the whole group after `grace_seconds`."""
    if grace_seconds > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how_it_ended(code: int, *, short_of_memory: bool = False) -> str:
    """Describe an exit status, or minus the number of the signal that killed a process."""
    if code == -signal.SIGKILL and short_of_memory:
        return "the kernel killed it, because memory ran out"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it ended by itself with status {code}"


def hide_argument(pid: int, secret: str) -> None:
    """Overwrite a secret in the command line of a child, which every user can read.

    The secret stays there where the kernel does not let a parent do this.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        # Fields 48 and 49 of proc_pid_stat(5) are the bounds of the arguments; field 2, a name,
        # may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start = int(fields[45])
        end = int(fields[46])
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(secret.encode(), b" " * len(secret)))


def shm_prefix(folder: Path) -> str:
    """Prefix of a server's shared-memory files."""
    return folder.name.replace("-", "_") + "_"


def hide_shared_memory(folder: Path) -> None:
    """Unlink a server's files in /dev/shm: its processes keep them open, no other can open them."""
    for file in Path("/dev/shm").glob(f"{shm_prefix(folder)}*"):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def server_folder() -> Iterator[Path]:
    """A folder for a server that only its owner can read, locked while the server lives, and
    removed at the end.
    """
    remove_leftovers()
    parent = Path(tempfile.gettempdir())
    with disk_errors(parent, DISK_ADVICE):
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    with contextlib.ExitStack() as stack:
        with disk_errors(parent, DISK_ADVICE):
            stack.enter_context(hold(folder))
            stack.callback(_remove, folder)
            (folder / "models").mkdir()  # a folder with this and without a lock is left over
        yield folder


def remove_leftovers(parent: Path | None = None) -> None:
    """Remove the folders of killed servers from `parent`, or from the folder for temporary files;
    their locks are gone.
    """
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{FOLDER_PREFIX}*"):
        # A folder of another user can't be read; one that was just made is not locked yet.
        with contextlib.suppress(OSError):
            if (folder / "models").is_dir():
                with hold(folder):
                    _remove(folder)


def _remove(folder: Path) -> None:
    hide_shared_memory(folder)
    shutil.rmtree(folder, ignore_errors=True)
