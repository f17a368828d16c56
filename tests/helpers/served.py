"""Fixtures of a small release; what makes it, and so PyTorch, is imported where a test asks for
it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.shared import shared

if TYPE_CHECKING:
    import tritonclient.grpc as grpc

    from radapter_serve.server.triton_server import TritonServer
    from tests.helpers.small_release import Local


@pytest.fixture(scope="session")
def repository(common: Path) -> Path:
    def make(folder: Path) -> None:
        from tests.helpers.small_release import write_release

        write_release(folder, 1, seed=1, dense=False)
        write_release(folder, 2, seed=2)

    return shared(common, "release", make)


@pytest.fixture
def sealed(repository: Path, tmp_path: Path) -> Path:
    """A copy of the two releases, with digests, that a test may change."""
    from tests.helpers.small_release import seal

    copy = shutil.copytree(repository, tmp_path / "repository")
    seal(copy, 1, 2)
    return copy


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    from radapter_serve.server.config import ServerConfig
    from radapter_serve.server.endpoints import Endpoints
    from radapter_serve.server.triton_server import TritonServer

    with TritonServer(ServerConfig(repository, Endpoints.on_free_ports(), timeout=120)) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[grpc.InferenceServerClient]:
    from tests.helpers.asking import connect

    with connect(server) as client:
        yield client


@pytest.fixture
def local(repository: Path) -> Local:
    from tests.helpers.small_release import Local

    return Local(repository, 2)
