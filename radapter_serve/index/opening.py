"""Opening an index for searches, whatever holds it."""

from __future__ import annotations

from pathlib import Path

from radapter_serve.errors import check_installed
from radapter_serve.index.bucket import link_of
from radapter_serve.index.index import Index
from radapter_serve.index.qdrant import is_qdrant


def open_index(folder: Path) -> Index:
    """The index of a folder: what the folder holds, or what it links to.

    Raises:
        RAdapterError: there is no index, or a broken one.
    """
    if not is_qdrant(link_of(folder)):
        return Index(folder)
    check_installed("qdrant_client", "qdrant")
    from radapter_serve.index.hosted import HostedIndex  # here: a server without such an index needs no client

    return HostedIndex(folder)
