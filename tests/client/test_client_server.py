"""The client against a real tritonserver with stand-in models, the same over gRPC and HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from radapter_client import Client, InvalidRequest, ModelNotFound
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import tritonserver
from tests.helpers.fake_server import write_repository

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with tritonserver(write_repository(tmp_path_factory.mktemp("fake") / "models")) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def url(server: TritonServer, request: pytest.FixtureRequest) -> str:
    return server.grpc_url if request.param == "grpc" else server.http_url


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
        assert {
            result.release
            for result in pinned.classify([b"x"] * 40, ["a cat", "ein Hündchen", "🦊"])
        } == {1}
    with Client(url, release=7) as absent:
        assert not absent.is_ready()
        with pytest.raises(ModelNotFound, match="release 7; it serves 1, 2"):
            absent.release()
        with pytest.raises(ModelNotFound, match="version 7 is not found"):
            absent.embed_texts(["x"])
