"""Putting an index on object storage or into Qdrant, and a folder that stands for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.files import staged
from radapter_serve.index.bucket import (
    GENERATION,
    LINK,
    POINTER,
    bucket_errors,
    copy,
    file_system,
    is_generation,
    link_of,
)
from radapter_serve.index.index import Index, read_facts
from radapter_serve.index.qdrant import Qdrant, place_of
from radapter_serve.lock import lock


def publish(folder: Path, url: str, progress: Callable[[int, int], None] | None = None) -> bool:
    """Put an index on object storage or into Qdrant, in the place of the one there; readers see one or the other.

    Args:
        folder: of the index.
        url: `s3://BUCKET/PATH` or `qdrant://HOST:PORT/COLLECTION`.
        progress: called after every batch that Qdrant has, with the images that are there and all.

    Returns:
        False where it is there already.

    Raises:
        RAdapterError: there is no index, it can't be searched, or the storage refuses.
    """
    place, before = place_of(url), None
    if link_of(folder):
        raise RAdapterError(f"{folder} stands for a published index; publish the index that it was made of")
    read_facts(folder)  # locking would make the folder
    with lock(folder, "radapter-index"):
        index = Index(folder, complete=True)  # whole, or refused
        if isinstance(place, Qdrant):
            return _upload(index, url, progress)
        bucket = place
        data = (folder / POINTER).read_bytes()
        generation = f"g-{hashlib.sha256(data).hexdigest()[:16]}"
        with contextlib.suppress(RAdapterError):
            before = bucket.facts()[GENERATION]
        if before == generation:
            return False
        with bucket_errors(url):
            for part in (path for path in folder.iterdir() if path.is_dir()):
                copy(str(part), f"{bucket.path}/{generation}/{part.name}", down=False)
            system = file_system()
            with system.open_output_stream(f"{bucket.path}/{POINTER}") as file:  # seen when it is whole
                file.write(json.dumps({**json.loads(data), GENERATION: generation}).encode())
            if before is not None:  # else nobody knows which one is being read
                _drop_all_but({before, generation}, system, bucket.path)
    return True


def link(url: str, out: Path) -> None:
    """Make a folder that stands for a published index, for a server to serve.

    Raises:
        RAdapterError: there is no such index, or something else stands at `out`.
    """
    place_of(url).facts()
    if out.exists() and not link_of(out):
        raise RAdapterError(
            f"{out} already exists and is not a link to a published index; give another folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with staged(out / POINTER) as temporary:
        temporary.write_text(json.dumps({LINK: url}), encoding="utf-8")


def _upload(index: Index, url: str, progress: Callable[[int, int], None] | None) -> bool:
    check_installed("qdrant_client", "qdrant")
    from radapter_serve.index.upload import upload  # here: it needs Qdrant's client

    return upload(index, url, progress)


def _drop_all_but(kept: set[str], system: Any, path: str) -> None:
    """Remove the other generations, those of publications that were killed included."""
    from pyarrow import fs

    for info in system.get_file_info(fs.FileSelector(path)):
        if is_generation(info.base_name) and info.base_name not in kept:
            system.delete_dir(info.path)
