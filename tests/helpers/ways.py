"""A repository served in each way that there is: by Triton, or in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from radapter_client import Client, Reply, Request
from radapter_serve.encoders.loaded import load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.gateway.in_process import answering
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.config import Endpoints, ServerConfig, free_ports
from radapter_serve.server.releases import ReleaseServer, admin_socket
from tests.helpers.asking import tritonserver


@dataclass(frozen=True)
class Running:
    """A server, where it answers, and its folder."""

    url: str
    server: ReleaseServer
    folder: Path


@contextlib.contextmanager
def by_triton(repository: Path, indexes: Path) -> Iterator[Running]:
    with (
        tritonserver(repository, indexes=indexes) as server,
        admin_socket(server.folder, server),
    ):
        yield Running(server.http_url, server, server.folder)


@contextlib.contextmanager
def in_process(repository: Path, indexes: Path, **settings: Any) -> Iterator[Running]:
    port = free_ports()[0]
    config = ServerConfig(repository, Endpoints("127.0.0.1", port), indexes=indexes)
    listed = Settings(port=port, indexes=indexes, model_repository=repository, **settings)
    with (
        answering(config, listed) as server,
        admin_socket(server.folder, server),
    ):
        yield Running(f"http://127.0.0.1:{port}", server, server.folder)


WAYS: dict[str, Callable[..., AbstractContextManager[Running]]] = {
    "triton": by_triton,
    "process": in_process,
}


# Ask a server with a request of the client; a refusal is an `InvalidRequest` or a `TaskError`.
Ask = Callable[[Request], Reply]


@contextlib.contextmanager
def by_engine(repository: Path, indexes: Path) -> Iterator[Ask]:
    with Engine([load_release(repository)]) as engine:
        yield lambda request: engine.infer(request.model, "", request.inputs)


@contextlib.contextmanager
def by_client(url: str) -> Iterator[Ask]:
    with Client(url, timeout=120) as client:
        transport = client._sender._transport
        yield lambda request: transport.send(request, 120)


@contextlib.contextmanager
def by_process(repository: Path, indexes: Path) -> Iterator[Ask]:
    with in_process(repository, indexes) as running, by_client(running.url) as ask:
        yield ask


@contextlib.contextmanager
def by_triton_client(scheme: str, repository: Path, indexes: Path) -> Iterator[Ask]:
    with tritonserver(repository, indexes=indexes) as server:
        url = server.http_url if scheme == "http" else server.grpc_url
        with by_client(url) as ask:
            yield ask


ASKING: dict[str, Callable[[Path, Path], AbstractContextManager[Ask]]] = {
    "engine": by_engine,
    "process": by_process,
    "triton-http": partial(by_triton_client, "http"),
    "triton-grpc": partial(by_triton_client, "grpc"),
}
