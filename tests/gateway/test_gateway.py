"""What the gateway lets through and what it refuses, over real connections, in front of a stand-in for Triton."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from radapter_client import AsyncClient, Client
from tests.helpers.fake_upstream import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def test_the_client_works_unchanged(served: Served) -> None:
    with Client(served.url) as client:
        assert client.release().version == 1 and client.is_ready()
        assert client.embed_texts(["abc", "ü"]).tolist() == [[3, 97], [2, 195]]
        assert np.array_equal(client.embed_images([b"\x05xy"]), [[3, 5]])


async def unused() -> AsyncClient:
    return AsyncClient()
