"""Cores and memory are counted and divided, against figures worked out by hand."""

from __future__ import annotations

import math
import os

import pytest

from radapter_serve.process import (
    THREADS,
    cores,
    decoders,
    environment,
    memory_limit,
    total,
)

GROUPS = "proc/self/cgroup"
TOP = "sys/fs/cgroup"
SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@pytest.mark.parametrize(
    ("allowed", "files", "expected"),
    [
        (6, {}, 6),  # there are no control groups
        (8, {GROUPS: "0::/\n", f"{TOP}/cpu.max": "max 100000\n"}, 8),
        (
            8,
            {
                GROUPS: "0::/a/b\n",
                f"{TOP}/a/b/cpu.max": "max 100000\n",
                f"{TOP}/a/cpu.max": "150000 100000\n",
            },
            2,
        ),
        (8, {GROUPS: "0::/a\n", f"{TOP}/a/cpu.max": "50000 100000\n"}, 1),
        (2, {GROUPS: "0::/a\n", f"{TOP}/a/cpu.max": "400000 100000\n"}, 2),
        (8, {GROUPS: "0::/gone\n", f"{TOP}/cpu.max": "300000 100000\n"}, 3),
        (
            8,
            {
                GROUPS: "5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n",
                f"{TOP}/cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                f"{TOP}/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                f"{TOP}/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                f"{TOP}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        # Threads of one core count once; of cores 2, 3, 6 and 7 nothing is known.
        (8, {SIBLINGS.format(n): f"{n % 4},{n % 4 + 4}\n" for n in (0, 1, 4, 5)}, 2 + 4),
    ],
)
def test_cores_are_those_that_are_allowed_and_no_more_than_the_quota(
    allowed, files, expected, monkeypatch, tmp_path
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({GROUPS: "0::/a\n", f"{TOP}/a/memory.max": "max\n"}, math.inf),
        (
            {
                GROUPS: "0::/a/b\n",
                f"{TOP}/a/b/memory.max": "9000\n",
                f"{TOP}/a/memory.max": "7000\n",
            },
            7000,
        ),
        ({GROUPS: "0::/gone\n", f"{TOP}/memory.max": "5000\n"}, 5000),
        (
            {
                GROUPS: "5:memory:/x\n4:cpu:/y\n0::/\n",
                f"{TOP}/memory/x/memory.limit_in_bytes": "4000\n",
                f"{TOP}/memory/memory.limit_in_bytes": "9223372036854771712\n",
                f"{TOP}/cpu/y/memory.limit_in_bytes": "1\n",
            },
            4000,
        ),
    ],
)
def test_memory_is_limited_by_the_control_groups(files, expected, tmp_path):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory_limit(tmp_path) == expected


def test_what_is_given_counts_in_the_processes_of_the_server(monkeypatch):
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert (total(), decoders(), decoders(8)) == (cores(), min(4, cores()), cores())
    for name, value in environment(3).items():
        monkeypatch.setenv(name, value)
    assert (total(), decoders(), decoders(8)) == (3, 3, 3)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
