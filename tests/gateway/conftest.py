from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from radapter_serve.gateway import app, connections
from tests.helpers.asking import tritonserver
from tests.helpers.fake_upstream import Served, serving
from tests.helpers.gateway import gateway
from tests.helpers.ways import in_process


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(app, "GRACE", 0.2)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(params=["process", pytest.param("triton", marks=pytest.mark.triton)])
def url(request: pytest.FixtureRequest, releases: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of the gateway's app, which answers for an engine in its process or for Triton."""
    indexes = tmp_path / "indexes"
    indexes.mkdir()
    if request.param == "process":
        with in_process(releases, indexes) as running:
            yield running.url
        return
    with (
        tritonserver(releases, indexes=indexes) as server,
        gateway(server, indexes=indexes) as address,
    ):
        yield address
