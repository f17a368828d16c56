from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.fake_upstream import Served, serving


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served
