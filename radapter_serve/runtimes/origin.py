"""A release by where it is: in a model repository, or on a running server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from radapter_serve.release.repository import split_repository
from radapter_serve.release.served import Served
from radapter_serve.runtimes.embedding_release import EmbeddingRelease


def release_of(origin: Mapping[str, str], version: int | None = None) -> EmbeddingRelease:
    """The release that is at `model_repository` or at `url`; close it at the end.

    Args:
        origin: one of the two. A repository may name a release, as `DIR@N`.
        version: number of the release in a repository that names none; the one that is served if
            None.

    Raises:
        RAdapterError: there is none.
    """
    if "url" in origin:
        from radapter_serve.runtimes.served_release import ServerRelease

        return ServerRelease(origin["url"])
    from radapter_serve.runtimes.local_release import LocalRelease

    repository, number = split_repository(origin["model_repository"])
    if version is None and not number:
        version = max(Served.load(Path(repository)).releases, default=None)
    return LocalRelease(origin["model_repository"], version)
