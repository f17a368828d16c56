"""Hostile requests through the gateway: each is refused in words, and nothing else comes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile.campaign import run
from tests.hostile.generate import of_kind
from tests.hostile.world import Good, engine, open_files, rss, world

SEED = int(os.environ.get("HOSTILE_SEED", "1"))
REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "50000"))


@pytest.mark.parametrize(
    "count",
    [pytest.param(2_000, marks=pytest.mark.triton), pytest.param(REQUESTS, marks=pytest.mark.slow)],
)
def test_hostile_requests(count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    failures = Path(os.environ.get("HOSTILE_FAILURES", folder / "failures"))
    with world(folder) as running:
        before = running.processes()
        with Good(running.address) as good:
            report = run(running.address, SEED, range(count), failures=failures)
        for failure in report.failures:
            print(failure)
        assert not report.failures, (
            f"{len(report.failures)} broke a promise; their bytes are in {failures}"
        )
        assert report.count == count
        assert good.troubles == [] and good.asked >= 10
        assert running.processes() == before


@pytest.mark.slow
def test_refused_bodies_of_many_callers(tmp_path: Path) -> None:
    """Their bodies are thrown away, and neither connections nor memory stay."""
    numbers = of_kind("refused body") * 20
    with engine(tmp_path) as (address, process):
        # What the first requests load is not theirs.
        run(address, SEED, numbers[: len(numbers) // 20])
        files = open_files(process.pid)
        memory = rss(process.pid)
        with Good(address) as good:
            report = run(address, SEED, numbers, workers=100, failures=tmp_path / "failures")
        assert not report.failures, "; ".join(map(str, report.failures[:20]))
        assert good.troubles == [] and good.asked >= 10
        assert open_files(process.pid) <= files
        assert rss(process.pid) - memory < 48


@pytest.mark.slow
def test_hostile_requests_to_an_engine(tmp_path: Path) -> None:
    """The same promises hold where the tasks run in the gateway's own process."""
    with engine(tmp_path) as (address, process), Good(address) as good:
        report = run(address, SEED, range(2_000), failures=tmp_path / "failures")
        assert not report.failures, "; ".join(map(str, report.failures[:20]))
        assert report.count == 2_000 and process.poll() is None
    assert good.troubles == [] and good.asked >= 10
    assert process.returncode == 0
