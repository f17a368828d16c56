"""Looking after the processes of one tritonserver: which died, which no longer move, and why."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.server.processes import (
    STOPPED,
    Process,
    children,
    how_it_ended,
    killed_for_memory,
)

SERVER = "tritonserver"
GATEWAY = "radapter-gateway"
_SAME_TIME = 10.0  # seconds
_SEGMENTATION_FAULT = (
    "it ended by a segmentation fault, as a request of 4 MiB and more causes without the header "
    "Content-Type: application/json"
)


@dataclass(frozen=True)
class Failure:
    """Something that no longer works.

    Attributes:
        name: the model, `SERVER` or `GATEWAY`.
        why: a sentence without a full stop, about "it".
        version: of the model, or None.
    """

    name: str
    why: str
    version: int | None = None

    def __str__(self) -> str:
        version = "" if self.version is None else f" version {self.version}"
        what = (
            self.name if self.name in (SERVER, GATEWAY) else f"the process of {self.name}{version}"
        )
        return f"{what} died: {self.why}"


class Watched(Protocol):
    """What is asked of a process that is watched."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit status, or minus the number of the signal that ended it; None while it runs."""


class Watch:
    """What became of a tritonserver and the processes of its models.

    A look tells only what it has seen twice: a model's process that is unloaded is dead for a
    moment, too. What is told is started again with all processes of its model, so whatever becomes
    of the present ones after that is not told.

    Args:
        process: tritonserver.
        children: the processes that a process started, by their numbers.
        killed_for_memory: how many processes the kernel has killed for want of memory.
        clock: tells the time.
    """

    def __init__(
        self,
        process: Watched,
        *,
        children: Callable[[int], dict[int, Process]] = children,
        killed_for_memory: Callable[[], int] = killed_for_memory,
        clock: Clock = SYSTEM,
    ) -> None:
        self._process = process
        self._children = children
        self._killed_for_memory = killed_for_memory
        self._clock = clock
        self._names: dict[int, tuple[str, int]] = {}
        self._suspects: set[int] = set()
        self._told: set[int] = set()
        self._kills = killed_for_memory()
        self._starved = -math.inf

    def poll(self) -> list[Failure]:
        """What has died since the last look. What a signal has stopped is killed, for it holds up
        its callers.
        """
        kills = self._killed_for_memory()
        if kills > self._kills:
            self._starved = self._clock.monotonic()
        self._kills = kills
        short_of_memory = self._clock.monotonic() - self._starved < _SAME_TIME
        if (code := self._process.poll()) is not None:
            return [Failure(SERVER, _server_ended(code, short_of_memory=short_of_memory))]
        found = self._children(self._process.pid)
        with contextlib.suppress(OSError):
            found[self._process.pid] = Process.of(self._process.pid)
        self._learn(found)
        suspects = {pid for pid, process in found.items() if process.state in "ZT"} - self._told
        certain = suspects & self._suspects
        self._suspects = suspects
        models = {self._names[pid][0] for pid in certain if pid in self._names}
        told = (
            self._told | certain | {pid for pid, (name, _) in self._names.items() if name in models}
        )
        self._told = told & set(found)
        failures = [self._failure(pid, found[pid], short_of_memory) for pid in sorted(certain)]
        return list({(failure.name, failure.version): failure for failure in failures}.values())

    def models(self) -> dict[int, str]:
        """The models of the processes that live, by process number; to be asked once models were
        loaded, too.
        """
        living = self._children(self._process.pid)
        self._learn(living)
        return {
            pid: name
            for pid, (name, _) in self._names.items()
            if pid in living and living[pid].state != "Z"
        }

    def ticks(self, names: Collection[str]) -> int:
        """The processor's time that these models have used, 100 a second; of the server itself if
        `SERVER` is named.
        """
        pids = [pid for pid, name in self.models().items() if name in names]
        pids += [self._process.pid] if SERVER in names else []
        total = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                total += Process.of(pid).ticks
        return total

    def kill(self, name: str) -> None:
        """End all processes of a model, or the server."""
        pids = (
            [self._process.pid]
            if name == SERVER
            else [pid for pid, own in self.models().items() if own == name]
        )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _learn(self, found: Mapping[int, Process]) -> None:
        """Keep the models of processes: a dead one does not tell its own."""
        for pid, process in found.items():
            if (model := process.model) is not None:  # for a moment a child is still a shell
                self._names[pid] = model

    def _failure(self, pid: int, process: Process, short_of_memory: bool) -> Failure:
        if process.state == "T":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            why = STOPPED
        else:
            why = how_it_ended(
                os.waitstatus_to_exitcode(process.status), short_of_memory=short_of_memory
            )
        if pid == self._process.pid:
            return Failure(SERVER, why)
        if pid not in self._names:  # which model to load again is unknown, so all are
            return Failure(SERVER, f"process {pid} of it ended: {why}")
        name, version = self._names[pid]
        return Failure(name, why, version)


def _server_ended(code: int, *, short_of_memory: bool) -> str:
    if code == -signal.SIGSEGV:
        return _SEGMENTATION_FAULT
    return how_it_ended(code, short_of_memory=short_of_memory)
