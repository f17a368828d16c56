"""Releases of a model repository in this process, changed while they are served."""

from __future__ import annotations

import contextlib
from pathlib import Path

from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.encoder import GraphEncoder
from radapter_serve.encoders.loaded import LoadedRelease, load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import encoders_of
from radapter_serve.release.integrity import verify
from radapter_serve.release.repository import RUNTIMES, Served, format_list
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.launch import server_folder
from radapter_serve.server.models import check_agreement, check_repository, configure
from radapter_serve.server.releases import ReleaseServer, Say


class EngineServer(ReleaseServer):
    """An engine with the releases that are served; `radapter-release` finds it by its `folder`."""

    engine: Engine
    folder: Path

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.runtime = config.runtime  # of all encoders; None for that of the export
        self._releases: dict[int, LoadedRelease] = {}
        self._stack = contextlib.ExitStack()

    def start(self, progress: Say = lambda line: None) -> EngineServer:
        """Load the releases, and ask each of their tasks once."""
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
        """Let go of everything."""
        self._stack.close()

    def _take_over(self, wanted: Served, say: Say) -> None:
        # Load what is not loaded yet, and check it.
        config = self.config
        runtime = self.runtime
        releases: dict[int, LoadedRelease] = {}
        for number in wanted.releases:
            if number in self._releases:
                releases[number] = self._releases[number]
                continue
            asked = runtime
            runtime, _ = configure(  # the same for all releases
                config.model_repository, [number], asked, config.encoder_threads, RUNTIMES, say
            )
            say(f"loading release {number}")
            loaded = load_release(
                config.model_repository,
                number,
                indexes=config.indexes,
                runtime=runtime,
                threads=config.encoder_threads,
            )
            assert isinstance(loaded.encoder, GraphEncoder)
            for encoder in encoders_of(config.model_repository, [number]):
                if asked not in (None, encoder.runtime):  # compared by `configure`
                    continue
                say(f"comparing {encoder.name} of release {number} with torch's embeddings")
                check_agreement(encoder, number, loaded.encoder.graphs[encoder.name])
            releases[number] = loaded
        say(f"asking the tasks of release {format_list(wanted.releases)}")
        try:
            prepared = self.engine.prepare(list(releases.values()))
        except TaskError as error:
            raise RAdapterError(f"a task does not answer: {error.message}") from error

        # From here on they are served.
        self.engine.commit(prepared)
        self.runtime = runtime
        self._releases = releases

    def __enter__(self) -> EngineServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()
