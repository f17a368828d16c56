"""A server whose releases can be changed while it runs, and back."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import check
from radapter_serve.release.repository import Served, releases_of
from radapter_serve.server.config import ServerConfig

Say = Callable[[str], None]


def ignore(line: str) -> None:
    """Takes the place of a progress display."""


class State(Enum):
    """The state of a server."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SWITCHING = "changing its releases"
    STOPPING = "stopping"


class ReleaseServer(ABC):
    """Serves releases of a model repository; `load` and `rollback` serve others.

    `lock` guards `state`, the processes and the folder.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.served = Served(())
        self.state = State.STOPPED
        self.lock = threading.RLock()

    @abstractmethod
    def _take_over(self, wanted: Served, say: Say) -> None:
        """Check that releases answer rightly, and serve them; what is served stays if they do
        not.
        """

    def load(self, releases: Sequence[int], say: Say = ignore) -> str:
        """Serve these releases in the place of the present ones.

        The highest answers callers who name none. `say` takes a short line before each step; the
        result is one about what was done. The present releases stay if one of these does not exist,
        is not as it was exported, or does not answer rightly.
        """
        wanted = require_known(self.config.model_repository, releases)
        return self._change(self.served.next(wanted), say)

    def rollback(self, say: Say = ignore) -> str:
        """Serve again what was served before, as `load` does."""
        return self._change(previous(self.served), say)

    def describe(self) -> dict[str, Any]:
        """The releases and the address of the server, for `radapter-release`."""
        endpoints = self.config.endpoints
        return {
            "repository": str(self.config.model_repository),
            "indexes": str(self.config.indexes),
            "http_port": endpoints.http_port,
            "url": endpoints.http_url,
            "releases": self.served.releases,
            "before": self.served.before,
        }

    def _change(self, wanted: Served, say: Say) -> str:
        repository = self.config.model_repository
        named = format_list(wanted.releases)
        if wanted.releases == self.served.releases:
            return f"release {named} is served already"
        with self.lock:
            if self.state != State.READY:
                raise RAdapterError(
                    f"the server is {self.state.value} already; wait for it: radapter-release list"
                )
            self.state = State.SWITCHING
        try:
            check(repository, wanted.releases, say)
            self._take_over(wanted, say)
            self.served = wanted
        except RAdapterError as error:
            still = f"release {format_list(self.served.releases)} is served as before"
            raise RAdapterError(f"release {named} was not loaded, and {still}: {error}") from error
        finally:
            with self.lock:
                if self.state == State.SWITCHING:
                    self.state = State.READY
        try:
            wanted.save(repository)
        except OSError as error:
            return (
                f"release {named} is served, until the server ends: {repository} cannot be written"
                f" ({error.strerror}), so a restart forgets it"
            )
        return f"release {named} is served"


def require_known(repository: Path, releases: Sequence[int]) -> list[int]:
    """Sorted numbers of releases, all of which the repository holds."""
    known = releases_of(repository)
    if not known:
        raise RAdapterError(
            f"no release in the model repository {repository}; make one with: radapter-export"
        )
    for version in releases:
        if version not in known:
            raise RAdapterError(
                f"no release {version} in {repository}; it holds {format_list(known)}"
            )
    return sorted(set(releases))


def previous(served: Served) -> Served:
    """The releases that a rollback serves."""
    if not served.before:
        raise RAdapterError(
            "no release was served before this one; name one: radapter-release load N"
        )
    return served.next(served.before)


def format_list(versions: Sequence[int]) -> str:
    """Numbers as text, such as "1, 2"."""
    return ", ".join(map(str, versions)) or "none"
