"""Releases of a model repository in this process, changed while they are served."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from radapter_serve.contract.errors import TaskError
from radapter_serve.engine.engine import Engine
from radapter_serve.engine.version import LocalVersion
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.repository import RUNTIMES
from radapter_serve.release.served import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.installation import OUR_BACKENDS, Installation
from radapter_serve.server.models import kept_for_indexes, models_of, parsed
from radapter_serve.server.processes import FOLDER_PREFIX, lock_folder, remove, remove_leftovers
from radapter_serve.server.releases import format_list, previous, require_known, save
from radapter_serve.server.runtime_choice import Measured, configure

Say = Callable[[str], None]

# What the engine can run: all the runtimes there are.
_ENGINE = Installation(Path(sys.executable), {name: OUR_BACKENDS / name for name in RUNTIMES})


def _ignore(line: str) -> None:
    """Takes the place of a progress display."""


class EngineServer:
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
        self.config = config
        self.measured: Sequence[Measured] = ()
        self._runtime = config.runtime
        self._served = Served(())
        self._kept: dict[int, list[str]] = {}
        self._loaded: dict[int, LocalVersion] = {}
        self._one_at_a_time = threading.Lock()
        self._lock: int | None = None

    def start(self, progress: Say = _ignore) -> EngineServer:
        """Load the releases, and ask each of their tasks once.

        Args:
            progress: called with a short line before each step that takes long.

        Raises:
            RAdapterError: no release, one that is not as it was exported, or one that does not
                answer.
        """
        repository = self.config.model_repository
        models_of(repository)
        served = Served.load(repository)
        if self.config.releases is not None:
            served = Served(tuple(sorted(self.config.releases)))
        check(repository, served.releases, progress)
        kept = kept_for_indexes(repository, served.releases, self.config.indexes)
        self.engine = Engine([], max_waiting=self.config.max_waiting)
        self._serve(served, kept, progress)
        remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._lock = lock_folder(self.folder)
        (self.folder / "models").mkdir()  # from now on, who is not locked is left over
        return self

    def stop(self) -> None:
        """Let go of everything."""
        if self._lock is None:
            return
        self.engine.close()
        remove(self.folder)
        os.close(self._lock)
        self._lock = None

    def load(self, releases: Sequence[int], say: Say) -> str:
        """Serve these releases in the place of the present ones; see `Releases.load`."""
        wanted = require_known(self.config.model_repository, releases)
        return self._change(self._served.next(wanted), say)

    def rollback(self, say: Say) -> str:
        """Serve again what was served before."""
        return self._change(previous(self._served), say)

    def remove_unneeded(self) -> None:
        """Let go of older releases that no index needs any more."""
        if not self._kept or not self._one_at_a_time.acquire(blocking=False):
            return
        try:
            releases = self._served.releases
            config = self.config
            kept = kept_for_indexes(config.model_repository, releases, config.indexes)
            if set(kept) < set(self._kept):
                self._serve(self._served, kept, _ignore)
        except RAdapterError:
            pass  # they stay a little longer
        finally:
            self._one_at_a_time.release()

    def state(self) -> dict[str, Any]:
        """What is served, for `radapter-release`."""
        return {
            "repository": str(self.config.model_repository),
            "http_port": self.config.endpoints.http_port,
            "url": self.config.endpoints.http_url,
            "releases": self._served.releases,
            "before": self._served.before,
            "kept": {str(version): names for version, names in self._kept.items()},
        }

    def _change(self, wanted: Served, say: Say) -> str:
        named = format_list(wanted.releases)
        if wanted.releases == self._served.releases:
            return f"release {named} is served already"
        if not self._one_at_a_time.acquire(blocking=False):
            raise RAdapterError(
                "the server is changing its releases already; wait for it: radapter-release list"
            )
        config = self.config
        try:
            check(config.model_repository, wanted.releases, say)
            kept = kept_for_indexes(config.model_repository, wanted.releases, config.indexes)
            self._serve(wanted, kept, say)
            return f"release {named} is served{save(config.model_repository, wanted)}"
        except RAdapterError as error:
            still = f"release {format_list(self._served.releases)} is served as before"
            raise RAdapterError(f"release {named} was not loaded, and {still}: {error}") from error
        finally:
            self._one_at_a_time.release()

    def _serve(self, served: Served, kept: dict[int, list[str]], say: Say) -> None:
        """Load what is not loaded yet, check it, and switch to it as a whole."""
        loaded = {
            number: self._loaded.get(number) or self._load(number, served.releases, say)
            for number in sorted({*served.releases, *kept})
        }
        say(f"asking the tasks of release {format_list(served.releases)}")
        try:
            self.engine.switch(
                [loaded[number] for number in served.releases], [loaded[number] for number in kept]
            )
        except TaskError as error:
            raise RAdapterError(f"a task does not answer: {error.message}") from error
        self._served = served
        self._kept = kept
        self._loaded = loaded

    def _load(self, number: int, releases: Collection[int], say: Say) -> LocalVersion:
        config = self.config
        configured = configure(
            config.model_repository, [number], self._runtime, config.encoder_threads, _ENGINE, say
        )
        if configured.measured:  # of all releases the same runtime
            self.measured = configured.measured
            self._runtime = configured.runtime
        say(f"loading release {number}")
        configs = {name: parsed(text) for name, text in configured.configs.items()}
        version = LocalVersion(config.model_repository, number, config.indexes, configs=configs)
        if number in releases:
            version.check(say)
        return version

    def __enter__(self) -> EngineServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()
