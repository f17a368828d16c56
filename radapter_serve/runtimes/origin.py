"""A release by where it is: in a model repository, or on a running server."""

from __future__ import annotations

from collections.abc import Mapping

from radapter_serve.runtimes.embedding_release import EmbeddingRelease


def release_of(origin: Mapping[str, str]) -> EmbeddingRelease:
    """The release that is at `model_repository` or at `url`; close it at the end.

    Raises:
        RAdapterError: there is none.
    """
    if "url" in origin:
        from radapter_serve.runtimes.served_release import ServerRelease

        return ServerRelease(origin["url"])
    from radapter_serve.runtimes.local_release import LocalRelease

    return LocalRelease(origin["model_repository"])
