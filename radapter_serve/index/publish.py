"""Putting an index into Qdrant, and a folder that links to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.index.index import link_of, open_index, read_facts, write_link
from radapter_serve.index.store.qdrant import Qdrant
from radapter_serve.lock import lock


def publish(folder: Path, url: str, progress: Callable[[int, int], None] | None = None) -> bool:
    """Put an index into Qdrant, in the place of the one there; readers see one
    or the other.

    Args:
        folder: of the index.
        url: `qdrant://HOST:PORT/COLLECTION`.
        progress: called after every batch that Qdrant has, with the images that are there and all.

    Returns:
        False where it is there already.

    Raises:
        RAdapterError: there is no index, it can't be searched, or the storage refuses.
    """
    place = Qdrant(url)
    if link_of(folder):
        raise RAdapterError(
            f"{folder} links to a published index; publish the index that it was made of"
        )
    read_facts(folder)  # locking would make the folder
    with lock(folder, "radapter-index"):
        index = open_index(folder, complete=True)  # whole, or refused
        check_installed("qdrant_client", "qdrant")
        from radapter_serve.index.upload import upload  # here: it needs Qdrant's client

        return upload(index, place, progress)


def link(url: str, out: Path) -> None:
    """Make a folder that links to a published index, for a server to serve.

    Raises:
        RAdapterError: there is no such index, or something else is at `out`.
    """
    Qdrant(url).current()
    if out.exists() and not link_of(out):
        raise RAdapterError(
            f"{out} already exists and is not a link to a published index; give another folder with"
            " --out"
        )
    write_link(out, url)
