"""How cores are counted and divided, against figures worked out by hand."""

from __future__ import annotations

import os

import pytest

from radapter_serve.process import (
    THREADS,
    cores,
    decoders,
    environment,
    total,
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of so many allowed cores, and the control groups of a process on it."""

    def make(allowed: int, groups: str = "", **files: str):
        monkeypatch.delenv(THREADS, raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
        for name, text in {"proc/self/cgroup": groups, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


TOP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("allowed", "groups", "files", "expected"),
    [
        (8, "0::/\n", {f"{TOP}/cpu.max": "max 100000\n"}, 8),
        (
            8,
            "0::/a/b\n",
            {f"{TOP}/a/b/cpu.max": "max 100000\n", f"{TOP}/a/cpu.max": "150000 100000\n"},
            2,
        ),
        (8, "0::/a\n", {f"{TOP}/a/cpu.max": "50000 100000\n"}, 1),
        (2, "0::/a\n", {f"{TOP}/a/cpu.max": "400000 100000\n"}, 2),
        (8, "0::/gone\n", {f"{TOP}/cpu.max": "300000 100000\n"}, 3),
        (
            8,
            "5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n",
            {
                f"{TOP}/cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                f"{TOP}/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                f"{TOP}/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                f"{TOP}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_cores_are_those_that_are_allowed_and_no_more_than_the_quota(
    machine, allowed, groups, files, expected
):
    assert cores(machine(allowed, groups, **files)) == expected


def test_threads_of_one_core_count_once(machine):
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    topology = {
        f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": f"{text}\n"
        for number, text in siblings.items()
    }
    assert cores(machine(8, **topology)) == 2 + 4  # and 2, 3, 6 and 7, of which nothing is known


def test_cores_where_there_are_no_control_groups(machine, tmp_path):
    machine(6)
    assert cores(tmp_path / "none") == 6


def test_what_is_given_counts_in_the_processes_of_the_server(machine, monkeypatch):
    machine(8)
    assert (total(), decoders(), decoders(8)) == (cores(), min(4, cores()), cores())
    for name, value in environment(3).items():
        monkeypatch.setenv(name, value)
    assert (total(), decoders(), decoders(8)) == (3, 3, 3)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
