"""`InProcess`: the upstream that asks an engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from radapter_client import Reply
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.encoder import collected
from radapter_serve.engine.engine import Engine, NotServed
from radapter_serve.gateway.run import GatewayServer, listen
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import (
    LOG,
    UNKNOWN_MODEL,
    Entry,
    Inference,
    Model,
    Refused,
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
        self._requests = ThreadPoolExecutor(max_concurrent, thread_name_prefix="request")
        # Indexes may wait for a slow file system.
        self._indexes = ThreadPoolExecutor(1, thread_name_prefix="indexes")

    async def infer(self, request: Inference, timeout: float, entry: Entry | None = None) -> Reply:
        cancelled = threading.Event()
        deadline = time.monotonic() + timeout

        def infer() -> Reply:
            with collected(None if entry is None else entry.steps):
                return self._engine.infer(
                    request.model,
                    request.version,
                    request.inputs,
                    request.outputs,
                    deadline=deadline,
                    cancelled=cancelled.is_set,
                )

        try:
            with _refusing(request.model):
                return await asyncio.get_running_loop().run_in_executor(self._requests, infer)
        finally:
            cancelled.set()

    async def config(self, model: str, version: str = "") -> Model:
        with _refusing(model):
            return Model.of(model, release_parameters(self._engine.releases(model, version)))

    async def ready(self, model: str, version: str = "") -> bool:
        return not version or int(version) in self._engine.versions()

    async def outdated_indexes(self) -> Mapping[str, bool]:
        return await asyncio.get_running_loop().run_in_executor(
            self._indexes, self._engine.outdated_indexes
        )

    async def close(self) -> None:
        for threads in (self._requests, self._indexes):
            threads.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _refusing(model: str) -> Iterator[None]:
    """Turn errors of the engine into refusals."""
    try:
        yield
    except TaskError as error:
        refused = from_status(error.status, str(error))
        if refused.status >= 500:
            LOG.warning("%s: %s", model, error)
        raise refused from None
    except NotServed as error:
        raise Refused(404, UNKNOWN_MODEL, str(error)) from None


@contextlib.contextmanager
def answering(config: ServerConfig, settings: Settings) -> Iterator[EngineServer]:
    """Serve an engine over HTTP in a thread of this process; raises `RAdapterError` for a release
    that can't be served, or a port that is taken.
    """
    with (
        contextlib.closing(listen(settings, "--http-")) as listener,
        EngineServer(config) as server,
    ):
        upstream = partial(InProcess, server.engine, settings.max_concurrent)
        with GatewayServer(settings, listener, upstream).in_thread():
            yield server
