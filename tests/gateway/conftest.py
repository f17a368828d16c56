from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.conftest import fake_repository, fake_server
from tests.helpers.fake_upstream import Served, serving

__all__ = ["fake_repository", "fake_server"]


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served
