"""Releases of a model repository in this process, changed while they are served."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from radapter_serve.contract.errors import TaskError
from radapter_serve.engine.engine import Engine, Prepared
from radapter_serve.engine.version import LocalVersion
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.repository import RUNTIMES
from radapter_serve.release.served import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.installation import OUR_BACKENDS, Installation
from radapter_serve.server.models import kept_for_indexes, models_of, parsed
from radapter_serve.server.processes import server_folder
from radapter_serve.server.releases import ReleaseChanges, Say, format_list
from radapter_serve.server.runtime_choice import Measured, configure

MAX_REQUEST_SECONDS = 120.0  # of work on one request, as in Triton's processes
# What the engine can run: all the runtimes there are.
_ENGINE = Installation(Path(sys.executable), {name: OUR_BACKENDS / name for name in RUNTIMES})


def ignore(line: str) -> None:
    """Takes the place of a progress display."""


@dataclass(frozen=True)
class Plan:
    """What an engine is to serve.

    Args:
        served: the releases.
        kept: older ones, with the names of the indexes that they made.
        runtime: of all encoders; as exported if None; "auto" takes the fastest.
        checked: whether its encoders have been compared with torch's embeddings already.
    """

    served: Served
    kept: Mapping[int, list[str]]
    runtime: str | None = None
    checked: bool = False


@dataclass(frozen=True)
class Ready:
    """What came of making a plan's releases ready.

    Attributes:
        runtime: of all encoders; None if each has that of its export.
        measured: what "auto" has measured; empty if nothing was.
    """

    runtime: str | None
    measured: Sequence[Measured] = ()


class Loaded:
    """An engine, and the releases of a repository that are loaded for it.

    Args:
        config: of the server.

    Attributes:
        engine: that answers.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.engine = Engine([], max_waiting=config.max_waiting, max_seconds=MAX_REQUEST_SECONDS)
        self._config = config
        self._versions: dict[int, LocalVersion] = {}
        self._next: tuple[Prepared, dict[int, LocalVersion]] | None = None

    def prepare(self, plan: Plan, say: Say) -> Ready:
        """Load what is not loaded yet, and check it; what is served stays.

        Args:
            plan: what is to be served after `commit`.
            say: called with a short line before each step.

        Raises:
            RAdapterError: a release that can't be loaded, or does not answer rightly.
        """
        self._next = None
        ready = Ready(plan.runtime)
        versions: dict[int, LocalVersion] = {}
        for number in sorted({*plan.served.releases, *plan.kept}):
            if number in self._versions:
                versions[number] = self._versions[number]
            else:
                versions[number], ready = self._load(number, plan, ready, say)
        say(f"asking the tasks of release {format_list(plan.served.releases)}")
        try:
            prepared = self.engine.prepare(
                [versions[number] for number in plan.served.releases],
                [versions[number] for number in plan.kept],
            )
        except TaskError as error:
            raise RAdapterError(f"a task does not answer: {error.message}") from error
        self._next = prepared, versions
        return ready

    def forget(self) -> None:
        """Let go of what was made ready and is not to be served; requests that wait go on."""
        self._next = None
        self.engine.release()

    def commit(self) -> None:
        """Serve what was made ready."""
        if self._next is None:
            raise RAdapterError("nothing is ready to be served")
        prepared, self._versions = self._next
        self._next = None
        self.engine.commit(prepared)

    def _load(self, number: int, plan: Plan, ready: Ready, say: Say) -> tuple[LocalVersion, Ready]:
        config = self._config
        repository = config.model_repository
        configured = configure(
            repository, [number], ready.runtime, config.encoder_threads, _ENGINE, say
        )
        if configured.measured:  # of all releases the same runtime
            ready = Ready(configured.runtime, configured.measured)
        say(f"loading release {number}")
        configs = {name: parsed(text) for name, text in configured.configs.items()}
        version = LocalVersion(repository, number, config.indexes, configs=configs)
        if not plan.checked:
            version.check(say, without=configured.checked)
        return version, ready


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
        served, kept = first_releases(self.config, progress)
        self._loaded = Loaded(self.config)
        self.engine = self._loaded.engine
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
        ready = self._loaded.prepare(Plan(wanted, kept, self._runtime), say)
        self._loaded.commit()
        self._runtime = ready.runtime
        self.measured = ready.measured or self.measured
        self._served = wanted
        self._kept = kept

    def __enter__(self) -> EngineServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()


def first_releases(config: ServerConfig, progress: Say) -> tuple[Served, dict[int, list[str]]]:
    """What a server begins with, its files checked: the releases, and older ones for the indexes
    that they made.

    Raises:
        RAdapterError: no release, or one that is not as it was exported.
    """
    repository = config.model_repository
    models_of(repository)
    served = config.wanted()
    check(repository, served.releases, progress)
    return served, kept_for_indexes(repository, served.releases, config.indexes)
