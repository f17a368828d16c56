"""The client against a real tritonserver with stand-in models, the same over gRPC and HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from radapter_client import Client, InvalidRequest, ModelNotFound
from tests.helpers.fake_model import embed, ranked
from tests.helpers.fake_server import FakeServer, write_repository

pytestmark = pytest.mark.triton

LABELS = ["a cat", "ein Hündchen", "🦊", "d", "e", "f, g"]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with FakeServer(write_repository(tmp_path_factory.mktemp("fake") / "models")) as server:
        yield server.urls


@pytest.fixture(params=["grpc", "http"])
def url(urls: dict[str, str], request: pytest.FixtureRequest) -> str:
    return urls[request.param]


def test_release(url: str) -> None:
    with Client(url) as client:
        release = client.release()
        assert (release.version, release.alpha, release.embed_dim) == (2, 1.0, 4)
        assert release.facts["preprocess"] == {"size": 32}
        assert [release.version for release in client.releases()] == [1, 2]
        with pytest.raises(InvalidRequest, match="this server does not list its indexes") as caught:
            client.indexes()
        assert caught.value.code is None
    with Client(url, release=1) as pinned:
        assert (pinned.release().version, pinned.release().alpha) == (1, 0.5)
        assert pinned.is_ready()
        assert {result.release for result in pinned.classify([b"x"] * 40, LABELS)} == {1}
    with Client(url, release=7) as absent:
        assert not absent.is_ready()
        with pytest.raises(ModelNotFound, match="release 7; it serves 1, 2"):
            absent.release()
        with pytest.raises(ModelNotFound, match="version 7 is not found"):
            absent.embed_texts(["x"])


def test_threads_share_a_client_and_many_images_keep_their_order(url: str) -> None:
    encoded = [label.encode() for label in LABELS]

    def work(index: int) -> None:
        # The first requests of the call are the slowest.
        images: list[Any] = [
            b'{"sleep": %f, "name": "%d %d"}' % (0.004 * (7 - number), index, number)
            for number in range(7)
        ]
        best = [ranked(image, encoded)[0] for image in images]
        assert [result.top.encode() for result in client.classify(images, LABELS)] == best
        embeds = client.embed_images(images)
        np.testing.assert_array_equal(embeds, [embed(image) for image in images])

    with Client(url, batch_size=2, concurrency=3) as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(20)))
