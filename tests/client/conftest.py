from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.fake_server import FakeServer, write_repository


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """One server for every test that does not harm it."""
    repository = write_repository(tmp_path_factory.mktemp("fake") / "model_repository")
    with FakeServer(repository) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(fake_server: FakeServer, protocol: str) -> str:
    return fake_server.urls[protocol]
