"""Releases of a model repository in this process, changed while they are served."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from radapter_serve.contract.errors import TaskError
from radapter_serve.encoders.encoder import GraphEncoder
from radapter_serve.encoders.loaded import LoadedRelease, load_release
from radapter_serve.engine.engine import Engine
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import verify
from radapter_serve.release.repository import RUNTIMES
from radapter_serve.release.served import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.installation import OUR_BACKENDS, Installation
from radapter_serve.server.models import kept_for_indexes, models_of
from radapter_serve.server.processes import server_folder
from radapter_serve.server.releases import ReleaseChanges, Say, format_list
from radapter_serve.server.runtime_choice import Measured, configure

MAX_REQUEST_SECONDS = 120.0  # of work on one request, as in Triton's processes
# What the engine can run: all the runtimes there are.
_ENGINE = Installation(Path(sys.executable), {name: OUR_BACKENDS / name for name in RUNTIMES})


def ignore(line: str) -> None:
    """Takes the place of a progress display."""


class EngineServer(ReleaseChanges):
    """An engine with the releases that are to be served.

    Args:
        config: what to serve, and how.

    Attributes:
        engine: that answers, from `start` on.
        folder: of this server, where `radapter-release` finds it.
        measured: what was found by `--runtime auto`.
    """

    engine: Engine
    folder: Path

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.measured: Sequence[Measured] = ()
        self._runtime = config.runtime
        self._releases: dict[int, LoadedRelease] = {}
        self._served = Served(())
        self._kept: dict[int, list[str]] = {}
        self._stack = contextlib.ExitStack()

    def start(self, progress: Say = ignore) -> EngineServer:
        """Load the releases, and ask each of their tasks once.

        Args:
            progress: called with a short line before each step that takes long.

        Raises:
            RAdapterError: no release, one that is not as it was exported, or one that does not
                answer.
        """
        config = self.config
        repository = config.model_repository
        models_of(repository)
        served = config.wanted()
        for number in served.releases:
            verify(repository, number, progress)
        self.engine = Engine([], max_waiting=config.max_waiting, max_seconds=MAX_REQUEST_SECONDS)
        kept = kept_for_indexes(repository, served.releases, config.indexes)
        self._take_over(served, kept, progress)
        self.folder = self._stack.enter_context(server_folder())
        self._stack.callback(self.engine.close)
        return self

    def stop(self) -> None:
        """Let go of everything."""
        self._stack.close()

    @property
    def served(self) -> Served:
        return self._served

    @property
    def kept(self) -> Mapping[int, list[str]]:
        return self._kept

    def _let_go(self, kept: dict[int, list[str]]) -> None:
        if set(kept) < set(self._kept):
            self._take_over(self._served, kept, ignore)

    def _take_over(self, wanted: Served, kept: dict[int, list[str]], say: Say) -> None:
        # Load what is not loaded yet, and check it; what is served stays.
        config = self.config
        runtime = self._runtime
        measured = self.measured
        releases: dict[int, LoadedRelease] = {}
        for number in sorted({*wanted.releases, *kept}):
            if number in self._releases:
                releases[number] = self._releases[number]
                continue
            configured = configure(
                config.model_repository, [number], runtime, config.encoder_threads, _ENGINE, say
            )
            if configured.measured:  # of all releases the same runtime
                runtime = configured.runtime
                measured = configured.measured
            say(f"loading release {number}")
            loaded = load_release(
                config.model_repository,
                number,
                indexes=config.indexes,
                runtime=configured.runtime,
                threads=config.encoder_threads,
            )
            assert isinstance(loaded.encoder, GraphEncoder)
            loaded.encoder.check_agreement(
                config.model_repository, loaded.release, say, without=configured.checked
            )
            releases[number] = loaded
        say(f"asking the tasks of release {format_list(wanted.releases)}")
        try:
            prepared = self.engine.prepare(
                [releases[number] for number in wanted.releases],
                [releases[number] for number in kept],
            )
        except TaskError as error:
            raise RAdapterError(f"a task does not answer: {error.message}") from error
        # From here on they are served.
        self.engine.commit(prepared)
        self._runtime = runtime
        self.measured = measured
        self._releases = releases
        self._served = wanted
        self._kept = kept

    def __enter__(self) -> EngineServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()
