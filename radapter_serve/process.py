"""This process: environment variables, threads, the signals that stop it, and its clock."""

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
# Variables of OpenTelemetry for the target of traces over OTLP; the second holds the full path.
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

# Signals of kill, systemd, Kubernetes and a closed terminal; Windows lacks SIGHUP.
STOPPING: tuple[int, ...] = (
    signal.SIGTERM,
    *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
)


class Clock(Protocol):
    """Interface of a clock, which the module `time` has; tests pass a fake."""

    def monotonic(self) -> float:
        """Return seconds that never decrease."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


SYSTEM: Clock = time


def otlp_endpoint() -> str | None:
    """Name of the variable that sets the target of traces; None if tracing is off."""
    for name in OTLP_ENDPOINTS:
        if os.environ.get(name):
            return name
    return None


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Handle signals with `handler` within the block; ignored ones, as under nohup, stay
    ignored.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    if threading.current_thread() is not threading.main_thread():  # handlers run only there
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
    """Number of cores that this process may use, according to its affinity and control groups."""
    # Hyper-threads of one core share its arithmetic units, so they count once.
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

    limits = [len(siblings)]
    for folder, version in _groups(root, "cpu"):
        try:
            if version == 1:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if float(quota) > 0:  # "max" raises a ValueError, and -1 means no quota
                limits.append(math.ceil(float(quota) / float(period)))
        except (OSError, ValueError):
            continue
    return max(1, min(limits))


def memory() -> float:
    """Bytes of memory that this process may have: the machine's, or less in a container."""
    import psutil  # not a dependency of a base installation

    return min(float(psutil.virtual_memory().total), memory_limit())


def memory_limit(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process allow, such as a container's; infinite for
    none.
    """
    limits = [math.inf]
    for folder, version in _groups(root, "memory"):
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        with contextlib.suppress(OSError, ValueError):  # "max" raises a ValueError
            limits.append(int((folder / name).read_text()))
    return min(limits)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of the control groups that limit this process, with the version of their kind:
    those of parent groups apply, too.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.strip("/")
        for folder in [group, *group.parents][: len(group.parts) - len(top.parts) + 1]:
            yield folder, 1 if controllers else 2


def total() -> int:
    """Number of threads that an encoder computes with: --threads, else one a core."""
    return int(os.environ.get(THREADS) or cores())


def decoders(max_threads: int = 4) -> int:
    """Number of images that are decoded at once."""
    return min(max_threads, total())


def environment(threads: int) -> dict[str, str]:
    """Variables for a server's processes: the cores are for the encoders, which use no OpenMP."""
    variables = {THREADS: str(threads)}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = os.environ.get(name, "1")
    return variables


def limit_threads(threads: int | None) -> None:
    """Set a command's number of threads, by default one a core; call before importing torch."""
    if threads is not None and threads < 1:
        raise RAdapterError(f"--threads is {threads}; allowed: 1 or more")
    # Waiting threads leave their cores to other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
