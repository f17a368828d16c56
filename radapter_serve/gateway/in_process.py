"""The way to an engine in this process, in place of Triton."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from radapter_client import Reply
from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.steps import collected
from radapter_serve.engine.engine import Engine, NotServed
from radapter_serve.gateway.errors import UNKNOWN_MODEL, Refused, from_status
from radapter_serve.gateway.models import Model
from radapter_serve.gateway.requests import Inference
from radapter_serve.gateway.run import GatewayServer, listen
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import LOG, Followed
from radapter_serve.release.release import release_parameters
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.engine_server import EngineServer

T = TypeVar("T")


class InProcess:
    """An `Upstream` that asks an engine.

    Args:
        engine: that answers.
        at_once: requests at the same time, each in a thread of its own, where it waits for others
            to be run with it.
    """

    def __init__(self, engine: Engine, at_once: int) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="request")
        # Of its own, for it must not wait until requests have ended.
        self._facts = ThreadPoolExecutor(1, thread_name_prefix="facts")
        # And this one may wait for an object storage.
        self._indexes = ThreadPoolExecutor(1, thread_name_prefix="indexes")

    async def infer(
        self, asked: Inference, timeout: float, followed: Followed | None = None
    ) -> Reply:
        gone = threading.Event()
        deadline = time.monotonic() + timeout

        def infer() -> Reply:
            with collected(None if followed is None else followed.steps):
                return self._engine.infer(
                    asked.model,
                    asked.version,
                    asked.inputs,
                    asked.outputs,
                    deadline=deadline,
                    cancelled=gone.is_set,
                )

        try:
            return await self._run(self._threads, infer, asked.model)
        finally:
            gone.set()  # where nobody waits any more

    async def config(self, model: str, version: str = "") -> Model:
        releases = await self._run(
            self._facts, partial(self._engine.releases, model, version), model
        )
        return Model.of(model, release_parameters(releases))

    async def versions(self, model: str) -> list[str]:
        found = await self._run(self._facts, self._engine.versions, model)
        return [str(version) for version in found]

    async def ready(self, model: str, version: str = "") -> bool:
        return not version or version in await self.versions(model)

    async def outdated_indexes(self) -> Mapping[str, bool]:
        return await asyncio.get_running_loop().run_in_executor(
            self._indexes, self._engine.outdated_indexes
        )

    async def close(self) -> None:
        for threads in (self._threads, self._facts, self._indexes):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], T], model: str) -> T:
        """What the engine says, whose errors become refusals."""
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except TaskError as error:
            refused = from_status(error.status, str(error))
            if refused.status >= 500:
                LOG.warning("%s: %s", model, error)
            raise refused from None
        except NotServed as error:
            raise Refused(404, UNKNOWN_MODEL, str(error)) from None


@contextlib.contextmanager
def answering(config: ServerConfig, settings: Settings) -> Iterator[EngineServer]:
    """An engine that answers over HTTP in a thread of this process.

    Args:
        config: what to serve, and how.
        settings: where to answer, and what is allowed.

    Raises:
        RAdapterError: a release that can't be served, or a port that is taken.
    """
    with contextlib.closing(listen(settings, "--http-")) as listener, EngineServer(config) as one:
        gateway = GatewayServer(
            settings, listener, lambda: InProcess(one.engine, settings.max_concurrent)
        )
        thread = threading.Thread(target=gateway.run, name="gateway")
        thread.start()
        try:
            gateway.began.wait(60)
            yield one
        finally:
            gateway.stop()
            thread.join()
