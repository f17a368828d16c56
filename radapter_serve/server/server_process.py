"""One tritonserver as a process of the operating system: started, asked whether it runs, and
stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True)
class Launch:
    """What a process is started with.

    Attributes:
        command: the program and its arguments.
        environment: all its variables.
        folder: its current folder.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path


class ServerProcess(Protocol):
    """A tritonserver that was started."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit status, or minus the number of the signal that ended it; None while it runs."""

    def stop(self, grace_seconds: float) -> None:
        """End it and its children: ask it to, and kill them all if it still runs after
        `grace_seconds`.
        """


StartProcess = Callable[[Launch, "IO[bytes] | None"], ServerProcess]


class TritonProcess:
    """A tritonserver of this machine; it ends with the thread that starts it.

    Args:
        launch: what to start.
        output: file for all that it writes; None is this process's stderr.
    """

    def __init__(self, launch: Launch, output: IO[bytes] | None) -> None:
        self._process = subprocess.Popen(
            launch.command,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            cwd=launch.folder,  # a model's process imports from the current folder first
            umask=0o077,  # no other user reads its memory in /dev/shm
            # Ctrl-C reaches this process only, which then stops the server in order
            start_new_session=True,
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    def stop(self, grace_seconds: float) -> None:
        """End it and its children: ask it to, and kill them all if it still runs after
        `grace_seconds`.
        """
        if grace_seconds > 0:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
