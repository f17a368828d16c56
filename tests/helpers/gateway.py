"""A gateway in this process, in front of a real tritonserver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from radapter_serve.gateway import run
from radapter_serve.gateway.settings import Settings
from radapter_serve.server.triton_server import TritonServer


@contextmanager
def gateway(server: TritonServer, **options: Any) -> Iterator[str]:
    """A gateway before a server; its URL."""
    settings = Settings(port=0, server=server.grpc_url.removeprefix("grpc://"), **options)
    scheme = "https" if settings.tls_certificate else "http"
    with run.listen(settings) as listener, run.GatewayServer(settings, listener).in_thread():
        yield f"{scheme}://localhost:{listener.getsockname()[1]}"
