"""Watches the processes of one tritonserver: which died or was stopped, and why."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import psutil

SERVER = "tritonserver"
_SEGMENTATION_FAULT = (
    "it ended with a segmentation fault, as a request of 4 MiB and more causes without the header "
    "Content-Type: application/json"
)


@dataclass(frozen=True)
class Death:
    """A death: `name` is a model or `SERVER`; `why` is a clause with the subject "it"."""

    name: str
    why: str
    version: int | None = None

    def __str__(self) -> str:
        if self.name == SERVER:
            return f"{self.name} died: {self.why}"
        version = "" if self.version is None else f" version {self.version}"
        return f"the process of {self.name}{version} died: {self.why}"


class Watch:
    """Polls a tritonserver and its child processes, which run the models."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._models: dict[int, tuple[str, int]] = {}  # name and version by process number
        self._suspects: set[int] = set()
        self._reported: set[int] = set()

    def poll(self) -> list[Death]:
        """Return the deaths since the last poll; kill stopped processes, whose callers wait."""
        if (code := self._process.poll()) is not None:
            why = how_it_ended(code)
            return [Death(SERVER, _SEGMENTATION_FAULT if code == -signal.SIGSEGV else why)]

        # Processes that are dead or stopped in this poll and the last one: a process whose model is
        # being unloaded is a zombie for a moment, too.
        states = self._states()
        bad = {psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED}
        suspects = {pid for pid, state in states.items() if state in bad}
        certain = sorted(suspects & self._suspects)
        self._suspects = suspects

        # Find why they died, once for each version of a model. A process of a model that is started
        # again may have been stopped later than the one that was reported.
        failures: dict[tuple[str, int | None], Death] = {}
        for pid in certain:
            is_stopped = states[pid] == psutil.STATUS_STOPPED
            if is_stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if pid in self._reported:
                continue
            why = "a signal had stopped it, so it was killed"
            if not is_stopped:
                code = 0
                # psutil has the exit status of direct children only.
                with contextlib.suppress(OSError, ValueError):
                    status = Path(f"/proc/{pid}/stat").read_text().split()[-1]
                    code = os.waitstatus_to_exitcode(int(status))
                why = how_it_ended(code)
            if pid == self._process.pid:
                failure = Death(SERVER, why)
            elif pid in self._models:
                name, version = self._models[pid]
                failure = Death(name, why, version)
            else:  # its model is unknown, so the whole server restarts
                failure = Death(SERVER, f"process {pid} of it ended: {why}")
            failures[failure.name, failure.version] = failure
        # The models that failed are started again, with all their processes.
        names = {failure.name for failure in failures.values()}
        again = {pid for pid, (name, _) in self._models.items() if name in names}
        self._reported = (self._reported | set(certain) | again) & states.keys()
        return list(failures.values())

    def models(self) -> dict[int, str]:
        """Models of the living processes, by process number."""
        states = self._states()
        return {
            pid: name
            for pid, (name, _) in self._models.items()
            if states.get(pid, psutil.STATUS_ZOMBIE) != psutil.STATUS_ZOMBIE
        }

    def cpu_seconds(self, names: Collection[str]) -> float:
        """CPU time in seconds that these models, or the server itself, have used."""
        pids = [pid for pid, name in self.models().items() if name in names]
        pids += [self._process.pid] if SERVER in names else []
        total = 0.0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    def kill(self, name: str) -> None:
        """Kill all processes of a model, or the server."""
        if name == SERVER:
            self._process.kill()
            return
        for pid, model in self.models().items():
            if model == name:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _states(self) -> dict[int, str]:
        """States of the server and its children by process number; also records their models."""
        states = {}
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self._process.pid)
            for process in (server, *server.children()):
                with contextlib.suppress(psutil.Error):
                    states[process.pid] = process.status()
                    model = re.search(r"([^/]+)/(\d+)/[^/]+$", "".join(process.cmdline()[1:2]))
                    if model and process is not server:  # a child is first a shell
                        self._models[process.pid] = (model[1], int(model[2]))
        return states


def how_it_ended(code: int) -> str:
    """Describe an exit status; a negative one is minus the number of the fatal signal."""
    if code == -signal.SIGKILL:
        return "it was killed by SIGKILL, as the kernel does where memory runs out"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it ended with status {code}"
