from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_server import FakeServer, write_repository


@pytest.fixture(scope="session")
def fake_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("fake") / "model_repository")


@pytest.fixture(scope="session")
def fake_server(fake_repository: Path) -> Iterator[FakeServer]:
    """One server for every test that does not harm it."""
    with FakeServer(fake_repository) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(fake_server: FakeServer, protocol: str) -> str:
    return fake_server.urls[protocol]
