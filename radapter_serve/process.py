"""This process: its environment variables, its threads, the signals that end it, and its clock."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from radapter_serve.errors import RAdapterError

# Variables that pass a server's settings to its processes.
THREADS = "RADAPTER_THREADS"  # number of threads that compute in an encoder
INDEXES = "RADAPTER_INDEXES"  # folder of the indexes that the task `retrieve` searches
SURPLUS = "RADAPTER_SURPLUS"  # folder of the files that say how many requests a model rejects
# Where traces go by OTLP, as OpenTelemetry names it; the second is for the full path.
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

# kill, systemd, Kubernetes and a closed terminal stop a program by these; Windows lacks SIGHUP.
STOPPING: tuple[int, ...] = (
    signal.SIGTERM,
    *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
)


class Clock(Protocol):
    """What the module `time` has of a clock, as a parameter: a test passes one that it sets."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


SYSTEM: Clock = time


def otlp_endpoint() -> str | None:
    """Name the variable that says where traces go; None if nothing is traced."""
    for name in OTLP_ENDPOINTS:
        if os.environ.get(name):
            return name
    return None


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Handle signals by `handler` within the block; an ignored one, as under nohup, stays so."""
    before = {number: signal.getsignal(number) for number in numbers}
    if threading.current_thread() is not threading.main_thread():  # signals reach no other thread
        before = {}
    try:
        for number, usual in before.items():
            if usual != signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual or signal.SIG_DFL)


def cores(root: Path = Path("/")) -> int:
    """How many cores this process may use, by its affinity and the quota of its groups."""
    # Two threads on one core share what multiplies matrices, so it counts once.
    allowed = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    siblings = set()
    for number in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        try:
            siblings.add((topology / "thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(number))

    # The quotas of control groups, of both versions; those above one's own count, too.
    limits = [len(siblings)]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.strip("/")
        for folder in [group, *group.parents][: len(group.parts) - len(top.parts) + 1]:
            try:
                if controllers:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:  # "max" or -1: none
                    limits.append(math.ceil(float(quota) / float(period)))
            except (OSError, ValueError):
                continue
    return max(1, min(limits))


def total() -> int:
    """Threads that an encoder computes with: those of --threads, else one a core."""
    return int(os.environ.get(THREADS) or cores())


def decoders(max_threads: int = 4) -> int:
    """How many images are decoded at once."""
    return min(max_threads, total())


def environment(threads: int) -> dict[str, str]:
    """Variables for a server's processes: the cores are for encoders, which use no OpenMP."""
    variables = {THREADS: str(threads)}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = os.environ.get(name, "1")
    return variables


def limit_threads(threads: int | None) -> None:
    """Let a command compute with so many threads, or one a core; before torch is loaded."""
    if threads is not None and threads < 1:
        raise RAdapterError(f"--threads is {threads}; allowed: 1 or more")
    # Threads that wait leave their cores to other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
