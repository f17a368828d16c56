"""An engine that answers over HTTP in this process: `EngineServer`, whose releases can change while
it runs, and `InProcess`, the gateway's `Upstream` to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from radapter_client import Reply
from radapter_serve.contract.errors import TaskError, until_deadline
from radapter_serve.encoders.encoder import collect_spans
from radapter_serve.encoders.loaded import LoadedRelease, load_release
from radapter_serve.encoders.precision import AS_EXPORTED
from radapter_serve.engine.engine import Engine
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.access import Threads
from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import LOG, Entry, Inference, ServedModel, from_status
from radapter_serve.release.integrity import verify
from radapter_serve.release.release import TASKS, release_parameters
from radapter_serve.release.repository import (
    ENCODERS,
    Served,
    check_repository,
    format_list,
)
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.launch import server_folder
from radapter_serve.server.releases import ReleaseServer, Say

CLOSE_SECONDS = 5.0  # for cancelled work to end, when the process stops
CHANGE_SECONDS = 20.0  # for the step of a change of releases to end, when the process stops


class EngineServer(ReleaseServer):
    """Serves releases with an `Engine` in this process; `radapter-release` finds its `folder`."""

    engine: Engine
    folder: Path

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self._releases: dict[int, LoadedRelease] = {}
        self._stack = contextlib.ExitStack()

    def start(self, progress: Say = lambda line: None) -> EngineServer:
        """Verify and load the served releases, and probe each of their tasks."""
        repository = self.config.model_repository
        check_repository(repository)
        served = Served.load(repository)
        for number in served.releases:
            verify(repository, number, progress)
        self.engine = Engine([], max_waiting=self.config.max_waiting)
        self._take_over(served, progress)
        self.served = served
        self.folder = self._stack.enter_context(server_folder())
        self._stack.callback(self.engine.close)
        return self

    def stop(self) -> None:
        """Close the engine and remove the server's folder."""
        # A thread that loads a model while Python ends would abort the process.
        self.end_changes(CHANGE_SECONDS)
        self._stack.close()

    def _take_over(self, wanted: Served, say: Say) -> None:
        # Load and check the releases that are not loaded yet.
        config = self.config
        repository = config.model_repository
        new = [number for number in wanted.releases if number not in self._releases]
        choice = self._choose(new, say, compared=True) if new else AS_EXPORTED
        releases: dict[int, LoadedRelease] = {}
        for number in wanted.releases:
            releases[number] = self._releases.get(number) or load_release(
                repository, number, indexes=config.indexes, choice=choice
            )
        say(f"asking the tasks of release {format_list(wanted.releases)}")
        try:
            prepared = self.engine.prepare(list(releases.values()))
        except TaskError as error:
            raise RAdapterError(f"a task does not answer: {error.message}") from error

        # Serve them from here on.
        self.engine.commit(prepared)
        if new:
            self._take(new, choice)
        self._releases = releases
        self.facts = {number: loaded.release for number, loaded in releases.items()}

    def __enter__(self) -> EngineServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()


class InProcess:
    """An `Upstream` to an engine in this process; each request waits in a thread for its batch.
    Probes have threads of their own, so that they are answered when all others work.
    """

    def __init__(self, engine: Engine, max_concurrent: int) -> None:
        self._engine = engine
        self._requests = Threads(max_concurrent, "request")
        self._probes = Threads(len(TASKS), "probe")

    async def infer(self, request: Inference, timeout: float, entry: Entry) -> Reply:
        cancelled = threading.Event()
        deadline = time.monotonic() + timeout

        def infer() -> Reply:
            if request.model in ENCODERS:
                embeds = self._engine.encode(
                    request.model,
                    request.version,
                    request.inputs,
                    cancelled=until_deadline(cancelled.is_set, deadline, "no answer in time"),
                )
                return Reply(int(request.version), {"embeds": embeds})
            with collect_spans(entry.spans):
                return self._engine.infer(
                    request.model,
                    request.version,
                    request.inputs,
                    request.outputs,
                    deadline=deadline,
                    cancelled=cancelled.is_set,
                )

        try:
            return await (self._probes if request.is_probe else self._requests).run(infer)
        except TaskError as error:
            refused = from_status(error.status, str(error))
            if refused.status >= 500:
                LOG.warning("%s: %s", request.model, error)
            raise refused from None
        finally:
            cancelled.set()

    async def config(self, model: str, version: str = "") -> ServedModel:
        try:
            releases = self._engine.releases(model, version)
        except TaskError as error:
            raise from_status(error.status, str(error)) from None
        return ServedModel.of(model, release_parameters(releases))

    async def ready(self, model: str, version: str = "") -> bool:
        return not version or int(version) in self._engine.versions()

    async def close(self) -> None:
        await self._requests.close(CLOSE_SECONDS)


def in_front_of(server: EngineServer, settings: Settings) -> GatewayServer:
    """Make the gateway of an `EngineServer` in this process, which may be started later."""
    return GatewayServer(settings, lambda: InProcess(server.engine, settings.max_concurrent))


@contextlib.contextmanager
def answering(config: ServerConfig, settings: Settings) -> Iterator[EngineServer]:
    """Serve an engine over HTTP in a thread of this process, for the block."""
    server = EngineServer(config)
    with in_front_of(server, settings) as gateway, server, gateway.in_thread():
        yield server
