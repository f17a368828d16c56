"""The one place that decides how many threads each part of a server or of a command gets."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from radapter_serve.environment import THREADS
from radapter_serve.errors import RAdapterError


def cores(root: Path = Path("/")) -> int:
    """How many cores this process may use: those it may run on, and no more than the quota of its
    control group.

    Two threads on one core share what multiplies matrices, so a core counts once however many it
    runs.

    Args:
        root: where `proc` and `sys` are.
    """
    allowed = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    own = {_siblings(root, number) for number in allowed}
    return max(1, min([len(own), *map(math.ceil, _quotas(root))]))


def total() -> int:
    """Threads that an encoder computes with: what the server was given with --threads, else one a
    core.
    """
    return int(os.environ.get(THREADS) or cores())


def decoders(max_threads: int = 4) -> int:
    """How many images are decoded at once."""
    return min(max_threads, total())


def threads_per_instance(threads: int, instances: int) -> int:
    """Threads of each of an encoder's instances, which compute at once when many ask for it.

    Encoders are not set against each other: where only images are asked for, half of the cores
    would idle, and where texts are, too, so many threads cost no more than they do one encoder
    alone (`benchmarks/README.md`): none spins.
    """
    return max(1, threads // instances)


def environment(threads: int) -> dict[str, str]:
    """Variables for the processes of a server: the cores are for the encoders, which do not use
    OpenMP.
    """
    own = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {THREADS: str(threads), **own}


def limit_threads(threads: int | None) -> None:
    """Let a command compute with so many threads, its encoders too; call it before torch is loaded.

    Args:
        threads: 1 or more; None takes one a core, or what OMP_NUM_THREADS says.

    Raises:
        RAdapterError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise RAdapterError(f"--threads is {threads}; allowed: 1 or more")
    # Threads that wait leave their cores to other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)


def _siblings(root: Path, number: int) -> str:
    """The processors that are one core with this one."""
    try:
        return (
            root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        ).read_text()
    except OSError:
        return str(number)


def _quotas(root: Path) -> list[float]:
    """Cores that control groups grant, of both versions; the groups above one's own count, too."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        own = top / path.strip("/")
        for folder in [own, *own.parents][: len(own.parts) - len(top.parts) + 1]:
            try:
                if controllers:
                    quota, period = (
                        (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
                    )
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:  # "max" or -1: none
                    quotas.append(float(quota) / float(period))
            except (OSError, ValueError):
                continue
    return quotas
