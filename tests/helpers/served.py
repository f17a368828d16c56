from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as grpc

from radapter_serve.server.triton_server import TritonServer, free_ports
from tests.helpers.asking import connect
from tests.helpers.small_release import Local, write_release


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "model_repository"
    write_release(folder, 1, seed=1, dense=False)
    write_release(folder, 2, seed=2)
    return folder


@pytest.fixture(scope="module")
def server(repository) -> Iterator[TritonServer]:
    with TritonServer(repository, "127.0.0.1", *free_ports(), timeout=120) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[grpc.InferenceServerClient]:
    with connect(server) as client:
        yield client


@pytest.fixture
def local(repository) -> Local:
    return Local(repository, 2)
