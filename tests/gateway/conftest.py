from __future__ import annotations

from collections.abc import Iterator

import pytest

from radapter_serve.gateway import app, connections
from tests.helpers.fake_upstream import Served, serving


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(app, "GRACE", 0.2)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served
