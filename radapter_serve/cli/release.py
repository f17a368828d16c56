"""radapter-release: the releases of a model repository, and the choice of those that a running
server serves.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from radapter_serve.cli import printable, run
from radapter_serve.errors import RAdapterError
from radapter_serve.index.facts import index_names
from radapter_serve.release import adapters
from radapter_serve.release.config import check
from radapter_serve.release.release import Release
from radapter_serve.release.repository import (
    MODELS,
    Served,
    format_list,
    releases_of,
    require_known,
)
from radapter_serve.server.releases import ask, find_server

PROG = "radapter-release"
REPOSITORY = Path("model_repository")


@dataclass(frozen=True)
class Server:
    """The model repository, and its running server.

    Args:
        model_repository: folder that radapter-export has filled.
        url: address of the server, http://localhost:PORT, if several serve the repository.
    """

    model_repository: Path = REPOSITORY
    url: str | None = None

    def state(self) -> tuple[Path | None, Served, dict[str, Any]]:
        """Find the running server (or None), the served releases, and its state."""
        port: int | None = None
        if self.url is not None:
            try:
                parts = urlsplit(self.url)
                port = parts.port or {"http": 8000, "https": 443}[parts.scheme]
                host = parts.hostname or ""
                if host != "localhost" and not ip_address(host).is_loopback:
                    raise ValueError("another machine's")
            except (ValueError, KeyError):
                raise RAdapterError(
                    f"--url is {self.url!r:.80}; allowed: the HTTP URL of a server on this machine,"
                    " such as http://localhost:8000"
                ) from None
        server = find_server(self.model_repository, port)
        if server is None:
            return None, Served.load(self.model_repository), {}
        state = ask(server, {"do": "state"})
        return server, Served(tuple(state["releases"]), tuple(state["before"])), state


def list_(server: tyro.conf.OmitArgPrefixes[Server] = Server()) -> None:
    """Show the releases of a repository, which of them are served, and the adapters beside them.

    Args:
        server: the repository and its server.
    """
    model_repository = server.model_repository
    versions = require_known(model_repository, releases_of(model_repository))
    _, served, state = server.state()
    table = Table(title=escape(str(model_repository)), title_justify="left")
    for column in ("release", "alpha", "architecture", "precision", "created", "served"):
        table.add_column(column, justify="right" if column in ("release", "alpha") else "left")
    towers: dict[str, list[int]] = {}
    for version in versions:
        try:
            release = Release.load(model_repository / "classify" / str(version))
        except (RAdapterError, TypeError) as error:
            table.add_row(str(version), "", "cannot be read", "", "", _cell(error))
            continue
        towers.setdefault(release.text_tower.digest(release.alpha), []).append(version)
        alpha = f"{release.alpha:g}{' or any' if release.dynamic_alpha else ''}"
        facts = release.architecture, release.precision, release.created
        how = "before" if version in served.before else ""
        if version in served.releases:
            is_default = len(served.releases) > 1 and version == max(served.releases)
            how = "yes, by default" if is_default else "yes"
        table.add_row(str(version), alpha, *map(_cell, facts), how)
    Console().print(table)

    # Show the adapters beside the releases, and which are damaged.
    table = Table("adapter", "alpha", "rank", "created", "beside release")
    for name, entry in adapters.read_list(model_repository).items():
        beside = format_list(towers.get(entry.text_tower, []))
        try:
            of_adapter = adapters.load(model_repository, name, entry).facts
        except RAdapterError as error:
            table.add_row(_cell(name), "", "", "", _cell(error))
            continue
        rank = "full" if of_adapter.rank is None else str(of_adapter.rank)
        alpha = f"{of_adapter.alpha:g}"
        table.add_row(_cell(name), alpha, rank, _cell(of_adapter.created), beside)
    if table.rows:
        Console().print(table)
    nobody = "no server runs here; this is what its next start serves"
    print(f"served at {state['url']}" if state else nobody)


def _cell(text: object) -> Text:
    """A cell of a table, of a release or an adapter that others may have made."""
    return Text(printable(text))


def load(
    release: tyro.conf.Positional[tuple[int, ...]],
    server: tyro.conf.OmitArgPrefixes[Server] = Server(),
) -> None:
    """Serve a release instead of the current one, without a pause: on a running server, or
    from its next start on.

    The release is checked first: its files against their digests, its encoders against torch's
    embeddings, its tasks with one request each. If a check fails, the current release stays. An
    interrupted command does not stop the server's work.

    Args:
        release: its number; several are served together, and the highest answers requests without
            a release.
        server: the repository and its server.
    """
    if not release:
        raise RAdapterError("name a release, such as: radapter-release load 2")
    wanted = require_known(server.model_repository, release)
    _do({"do": "load", "releases": wanted}, server, lambda served: served.next(wanted))


def rollback(server: tyro.conf.OmitArgPrefixes[Server] = Server()) -> None:
    """Serve the releases again that were served before, with the checks of `load`.

    Args:
        server: the repository and its server.
    """
    _do({"do": "rollback"}, server, Served.back)


def verify(
    release: Annotated[tyro.conf.Positional[int | None], tyro.conf.arg(metavar="[N]")] = None,
    *,
    model_repository: Path = REPOSITORY,
) -> None:
    """Compare the files of releases with the digests of their export, and check their configs.
    Needs no server.

    Args:
        release: number of the release; all releases if not given.
        model_repository: folder that radapter-export has filled.
    """
    versions = require_known(
        model_repository, releases_of(model_repository) if release is None else [release]
    )
    with Console(stderr=True).status("reading") as status:
        check(model_repository, versions, status.update)
    for version in versions:
        print(f"release {version}: as it was exported")


def add_adapter(
    name: tyro.conf.Positional[str],
    adapter: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    *,
    alpha: float | None = None,
    replace: bool = False,
    model_repository: Path = REPOSITORY,
) -> None:
    """Put an adapter on the text's projection beside the releases, under a name. Running servers
    take it with their next request.

    It belongs to the text tower that it was trained with: a release of the base, which
    radapter-export --alpha 0 makes, or one whose adapters change only the image tower.

    Args:
        name: what requests call it.
        adapter: folder of a run of the recipe quick, or an adapter file.
        alpha: α of requests without one, from 0 to 1; the run's choice by default.
        replace: replace an adapter of this name.
        model_repository: folder that radapter-export has filled.
    """
    facts, factors = adapters.read_run(adapter, alpha)
    beside = adapters.add_beside(model_repository, name, facts, factors, adapter, replace=replace)
    print(
        f"{name} is beside release {format_list(beside)} at alpha {facts.alpha:g}; ask it with:"
        f" radapter-query --adapter {shlex.quote(name)}"
    )
    if not facts.alpha:
        print(
            "at alpha 0 it answers as the base does: give another one in requests, or add it again"
            " with --alpha A --replace"
        )
    if facts.confidence is None:
        print(f"its scores are not calibrated; {adapters.CALIBRATED_RUN}")


def remove_adapter(name: tyro.conf.Positional[str], *, model_repository: Path = REPOSITORY) -> None:
    """Take an adapter away. Running servers refuse its name from the next request on.

    Args:
        name: name of the adapter.
        model_repository: folder that radapter-export has filled.
    """
    adapters.remove_adapter(model_repository, name)
    print(f"{name} is removed")


def _do(request: dict[str, Any], server: Server, offline: Callable[[Served], Served]) -> None:
    """Ask a repository's server to serve other releases; without one, `offline` says which its next
    start serves.
    """
    repository = server.model_repository
    running, served, state = server.state()
    wanted = offline(served)
    indexes = Path(state.get("indexes", "indexes"))
    for note in lacking(repository, served.releases, wanted.releases, indexes):
        print(f"note: {note}")
    with Console(stderr=True).status("asking the server") as status:
        if running is None:
            check(repository, wanted.releases, status.update)
            wanted.save(repository)
            done = (
                "no server runs here; from its next start on, release"
                f" {format_list(wanted.releases)} is served"
            )
        else:
            done = ask(running, request, lambda line: status.update(f"{escape(line)} ..."))
    print(done)


def lacking(
    repository: Path, before: Sequence[int], now: Sequence[int], indexes: Path
) -> list[str]:
    """List what callers lose if the releases `now` replace those `before`, one sentence each."""
    old = max(before, default=0)
    new = max(now)
    releases = {
        version: Release.load(repository / MODELS[-1] / str(version))
        for version in {*before, *now} & set(releases_of(repository))
    }
    notes = []

    # Requests without a release are answered by the newest one.
    if old in releases:
        had = releases[old]
        has = releases[new]
        lost = []
        if had.dense and not has.dense:
            lost.append("dense features, for segment without proposals (radapter-export --dense)")
        if had.confidence and not has.confidence:
            lost.append("calibrated scores (radapter-export --validation)")
        if had.dynamic_alpha and not has.dynamic_alpha:
            lost.append("an alpha of the caller's choice (radapter-export --alpha dynamic)")
        if gone := sorted(had.label_sets.keys() - has.label_sets.keys()):
            lost.append(f"the label sets {', '.join(gone)} (radapter-export --label-set)")
        if lost:
            notes.append(f"release {new} lacks what release {old} has: {'; '.join(lost)}")

    # Only releases that embed images like an index can search it.
    if index_names(indexes):
        from radapter_serve.index.index import releases_of as makers  # here: it loads libraries

        for name, maker in makers(indexes).items():
            able = [
                version
                for version, release in releases.items()
                if maker.is_of(release) or maker.is_near(release)
            ]
            if able and not set(able) & set(now):
                both = format_list([able[-1], *now]).replace(",", "")
                notes.append(
                    f"the index {name} is of release {able[-1]}, and cannot be searched without it;"
                    f" radapter-release load {both} serves both, until radapter-index has built it"
                    f" again with release {new}"
                )
    return notes


def main(argv: Sequence[str] | None = None) -> int:
    commands: dict[str, Any] = {
        "list": list_,
        "load": load,
        "rollback": rollback,
        "verify": verify,
        "add-adapter": add_adapter,
        "remove-adapter": remove_adapter,
    }
    description = "List, switch and verify releases, and the adapters beside them."
    return run(commands, argv, prog=PROG, description=description)
