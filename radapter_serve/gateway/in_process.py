"""`InProcess`: the upstream that asks an engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from radapter_client import Reply
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.encoder import collected
from radapter_serve.engine.engine import Engine
from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import (
    LOG,
    Entry,
    Inference,
    Model,
    from_status,
)
from radapter_serve.release.release import release_parameters
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.engine_server import EngineServer


class InProcess:
    """An `Upstream` that runs up to `max_concurrent` requests in threads, where each waits for its
    batch.
    """

    def __init__(self, engine: Engine, max_concurrent: int) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="request")

    async def infer(self, request: Inference, timeout: float, entry: Entry) -> Reply:
        cancelled = threading.Event()
        deadline = time.monotonic() + timeout

        def infer() -> Reply:
            with collected(entry.steps):
                return self._engine.infer(
                    request.model,
                    request.version,
                    request.inputs,
                    request.outputs,
                    deadline=deadline,
                    cancelled=cancelled.is_set,
                )

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, infer)
        except TaskError as error:
            refused = from_status(error.status, str(error))
            if refused.status >= 500:
                LOG.warning("%s: %s", request.model, error)
            raise refused from None
        finally:
            cancelled.set()

    async def config(self, model: str, version: str = "") -> Model:
        try:
            releases = self._engine.releases(model, version)
        except TaskError as error:
            raise from_status(error.status, str(error)) from None
        return Model.of(model, release_parameters(releases))

    async def ready(self, model: str, version: str = "") -> bool:
        return not version or int(version) in self._engine.versions()

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def in_front_of(server: EngineServer, settings: Settings) -> GatewayServer:
    """A gateway that asks an engine's server in this process, which may start after it."""
    return GatewayServer(settings, lambda: InProcess(server.engine, settings.max_concurrent))


@contextlib.contextmanager
def answering(config: ServerConfig, settings: Settings) -> Iterator[EngineServer]:
    """Serve an engine over HTTP in a thread of this process; raises `RAdapterError` for a release
    that can't be served, or a port that is taken.
    """
    server = EngineServer(config)
    with in_front_of(server, settings) as gateway, server, gateway.in_thread():
        yield server
