"""The releases of a running server: which are served, and the way to others and back."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import check
from radapter_serve.release.repository import releases_of
from radapter_serve.release.served import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.models import ModelEntry, kept_for_indexes
from radapter_serve.server.second_server import verify_in_second_server
from radapter_serve.server.switch import carry_out, check_side_by_side, plan_switch
from radapter_serve.server.triton_server import TritonServer

Say = Callable[[str], None]
Verify = Callable[[TritonServer, Sequence[int], Say], None]


class ReleaseChanges(ABC):
    """Changes which releases a server serves; one change at a time.

    Args:
        config: of the server, which stays an attribute.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._one_at_a_time = threading.Lock()

    @property
    @abstractmethod
    def served(self) -> Served:
        """What is served, and what was served before."""

    @property
    @abstractmethod
    def kept(self) -> Mapping[int, list[str]]:
        """Older releases with the names of the indexes that they made."""

    @abstractmethod
    def _take_over(self, wanted: Served, kept: dict[int, list[str]], say: Say) -> None:
        """Check that releases answer rightly, and serve them.

        Raises:
            RAdapterError: they do not; the present ones are still served.
        """

    @abstractmethod
    def _let_go(self, kept: dict[int, list[str]]) -> None:
        """Keep these older releases alone."""

    def load(self, releases: Sequence[int], say: Say) -> str:
        """Serve these releases in the place of the present ones.

        Args:
            releases: numbers; the highest answers callers who name none.
            say: called with a short line before each step.

        Returns:
            What was done, in one line.

        Raises:
            RAdapterError: a release does not exist, is not as it was exported, or does not answer
                rightly; the present releases are still served.
        """
        wanted = require_known(self.config.model_repository, releases)
        return self._change(self.served.next(wanted), say)

    def rollback(self, say: Say) -> str:
        """Serve again what was served before.

        Raises:
            RAdapterError: as `load`; or nothing was served before.
        """
        return self._change(previous(self.served), say)

    def remove_unneeded(self) -> None:
        """Unload older releases that no index needs any more."""
        if not self.kept or not self._one_at_a_time.acquire(blocking=False):
            return
        config = self.config
        try:
            releases = self.served.releases
            self._let_go(kept_for_indexes(config.model_repository, releases, config.indexes))
        except RAdapterError:
            pass  # they stay a little longer
        finally:
            self._one_at_a_time.release()

    def state(self) -> dict[str, Any]:
        """What is served and where, for `radapter-release`."""
        endpoints = self.config.endpoints
        return {
            "repository": str(self.config.model_repository),
            "http_port": endpoints.http_port,
            "url": endpoints.http_url,
            "releases": self.served.releases,
            "before": self.served.before,
            "kept": {str(version): names for version, names in self.kept.items()},
        }

    def _change(self, wanted: Served, say: Say) -> str:
        config = self.config
        named = format_list(wanted.releases)
        if wanted.releases == self.served.releases:
            return f"release {named} is served already"
        if not self._one_at_a_time.acquire(blocking=False):
            raise RAdapterError(
                "the server is changing its releases already; wait for it: radapter-release list"
            )
        try:
            check(config.model_repository, wanted.releases, say)
            kept = kept_for_indexes(config.model_repository, wanted.releases, config.indexes)
            self._take_over(wanted, kept, say)
            return f"release {named} is served{save(config.model_repository, wanted)}"
        except RAdapterError as error:
            still = f"release {format_list(self.served.releases)} is served as before"
            raise RAdapterError(f"release {named} was not loaded, and {still}: {error}") from error
        finally:
            self._one_at_a_time.release()


class Releases(ReleaseChanges):
    """The releases of a tritonserver.

    Args:
        server: that runs.
        verify: checks that releases answer rightly, before they are loaded.
    """

    def __init__(self, server: TritonServer, verify: Verify = verify_in_second_server) -> None:
        super().__init__(server.config)
        self._server = server
        self._verify = verify

    @property
    def served(self) -> Served:
        return self._server.serving.served

    @property
    def kept(self) -> Mapping[int, list[str]]:
        return self._server.serving.kept

    def _take_over(self, wanted: Served, kept: dict[int, list[str]], say: Say) -> None:
        server = self._server
        models = server.plan_models(wanted.releases, kept, say)
        check_side_by_side(server.serving.offered, models)
        self._verify(server, wanted.releases, say)
        with server.changing:
            self._switch(models, say)
            server.record(wanted, kept)

    def _let_go(self, kept: dict[int, list[str]]) -> None:
        server = self._server
        serving = server.serving
        remaining = {version: names for version, names in kept.items() if version in serving.kept}
        if len(remaining) < len(serving.kept):
            models = server.plan_models(serving.served.releases, remaining)
            self._switch(models, lambda line: None)
        server.record(serving.served, remaining)

    def _switch(self, models: Mapping[str, ModelEntry], say: Say) -> None:
        with self._server.changing:
            carry_out(plan_switch(self._server.serving.offered, models), self._server, say)


def require_known(repository: Path, releases: Sequence[int]) -> list[int]:
    """Sorted numbers of releases, after a check that they exist.

    Raises:
        RAdapterError: one does not exist, or the repository has none.
    """
    found = releases_of(repository)
    if not found:
        raise RAdapterError(
            f"no release in the model repository {repository}; make one with: radapter-export"
        )
    for version in releases:
        if version not in found:
            raise RAdapterError(
                f"no release {version} in {repository}; it holds {format_list(found)}"
            )
    return sorted(set(releases))


def previous(served: Served) -> Served:
    """What a rollback serves.

    Raises:
        RAdapterError: nothing was served before.
    """
    if not served.before:
        raise RAdapterError(
            "no release was served before this one; name one: radapter-release load N"
        )
    return served.next(served.before)


def save(repository: Path, served: Served) -> str:
    """Write `served.json`; returns what to add to the report if that is not possible."""
    try:
        served.save(repository)
    except OSError as error:
        return (
            f", until the server ends: {repository} cannot be written ({error.strerror}), so a"
            " restart forgets it"
        )
    return ""


def format_list(versions: Sequence[int]) -> str:
    """Numbers as text, such as "1, 2"."""
    return ", ".join(map(str, versions)) or "none"
