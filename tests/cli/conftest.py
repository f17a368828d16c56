"""The server that `radapter-query` asks."""

import pytest

from tests.client.conftest import fake_repository, fake_server
from tests.helpers.fake_server import FakeServer

__all__ = ["fake_repository", "fake_server"]


@pytest.fixture
def url(fake_server: FakeServer) -> str:
    return fake_server.urls["http"]
