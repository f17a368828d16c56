"""The releases of a running server: which are served, and the way to others and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import check
from radapter_serve.release.repository import releases_of
from radapter_serve.release.served import Served
from radapter_serve.server.models import kept_for_indexes
from radapter_serve.server.second_server import verify_in_second_server
from radapter_serve.server.switch import check_side_by_side, switch
from radapter_serve.server.triton_server import TritonServer

Say = Callable[[str], None]


class Releases:
    """Changes which releases a server serves; one change at a time.

    Args:
        server: that runs.
    """

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._one_at_a_time = threading.Lock()

    def load(self, releases: Sequence[int], say: Say) -> str:
        """Serve these releases in the place of the present ones.

        Args:
            releases: numbers; the highest answers whoever names none.
            say: called with a short line before each step.

        Returns:
            What became of it, in a line.

        Raises:
            RAdapterError: one is not there, is not as it was exported, or does not answer rightly; those that were
                served still are.
        """
        wanted = require_known(self._server.model_repository, releases)
        return self._change(self._server.served.next(wanted), say)

    def rollback(self, say: Say) -> str:
        """Serve again what was served before.

        Raises:
            RAdapterError: as `load`; or nothing was served before.
        """
        served = self._server.served
        return self._change(previous(served), say)

    def remove_unneeded(self) -> None:
        """Take away older releases that no index needs any more."""
        server = self._server
        if not server.kept or not self._one_at_a_time.acquire(blocking=False):
            return
        try:
            kept = kept_for_indexes(server.model_repository, server.served.releases, server.indexes)
            if set(kept) < set(server.kept):
                with server.changing:
                    switch(server, server.plan_models(server.served.releases, kept), lambda line: None)
            server.kept = {version: names for version, names in kept.items() if version in server.kept}
        except RAdapterError:
            pass  # they stay a little longer
        finally:
            self._one_at_a_time.release()

    def _change(self, wanted: Served, say: Say) -> str:
        server, named = self._server, format_list(wanted.releases)
        if wanted.releases == server.served.releases:
            return f"release {named} is served already"
        if not self._one_at_a_time.acquire(blocking=False):
            raise RAdapterError("the server is changing its releases already; wait for it: radapter-release list")
        try:
            check(server.model_repository, wanted.releases, say)
            kept = kept_for_indexes(server.model_repository, wanted.releases, server.indexes)
            models = server.plan_models(wanted.releases, kept, say)
            check_side_by_side(server.offered, models)
            verify_in_second_server(server, wanted.releases, say)
            with server.changing:
                switch(server, models, say)
                server.served, server.kept = wanted, kept
            return f"release {named} is served{save(server.model_repository, wanted)}"
        except RAdapterError as error:
            still = f"release {format_list(server.served.releases)} is served as before"
            raise RAdapterError(f"release {named} was not loaded, and {still}: {error}") from error
        finally:
            self._one_at_a_time.release()


def require_known(repository: Path, releases: Sequence[int]) -> list[int]:
    """These releases, once it is sure that they are there.

    Raises:
        RAdapterError: one is not, or none is named.
    """
    found = releases_of(repository)
    if not found:
        raise RAdapterError(f"no release in the model repository {repository}; make one with: radapter-export")
    for version in releases:
        if version not in found:
            raise RAdapterError(f"no release {version} in {repository}; it holds {format_list(found)}")
    return sorted(set(releases))


def previous(served: Served) -> Served:
    """What `rollback` goes to.

    Raises:
        RAdapterError: nothing was served before.
    """
    if not served.before:
        raise RAdapterError("no release was served before this one; name one: radapter-release load N")
    return served.next(served.before)


def save(repository: Path, served: Served) -> str:
    """Write `served.json`; returns what to add to the report where that is not possible."""
    try:
        served.save(repository)
    except OSError as error:
        return f", until the server ends: {repository} cannot be written ({error.strerror}), so a restart forgets it"
    return ""


def format_list(versions: Sequence[int]) -> str:
    """Numbers as a text."""
    return ", ".join(map(str, versions)) or "none"
