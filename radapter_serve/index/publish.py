"""Putting an index on object storage, and a folder that stands for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.index.bucket import (
    GENERATION,
    LINK,
    POINTER,
    Bucket,
    bucket_errors,
    copy,
    file_system,
    is_generation,
    is_link,
)
from radapter_serve.index.index import Index, read_facts
from radapter_serve.lock import lock


def publish(folder: Path, url: str) -> bool:
    """Put an index on object storage in the place of the one that is there; readers see one or the other.

    Args:
        folder: of the index.
        url: `s3://BUCKET/PATH`.

    Returns:
        False where it is there already.

    Raises:
        RAdapterError: there is no index, it can't be searched, or the storage refuses.
    """
    bucket, before = Bucket(url), None
    if is_link(folder):
        raise RAdapterError(f"{folder} stands for an index on object storage; publish the index that it was made of")
    read_facts(folder)  # locking would make the folder
    with lock(folder, "radapter-index"):
        Index(folder)  # whole, or refused
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
    """Make a folder that stands for an index on object storage, for a server to serve.

    Raises:
        RAdapterError: there is no such index, or something else stands at `out`.
    """
    Bucket(url).facts()
    if out.exists() and not is_link(out):
        raise RAdapterError(f"{out} stands already and is no link to object storage; give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    with staged(out / POINTER) as temporary:
        temporary.write_text(json.dumps({LINK: url}), encoding="utf-8")


def _drop_all_but(kept: set[str], system: Any, path: str) -> None:
    """Remove the other generations, those of publications that were killed included."""
    from pyarrow import fs

    for info in system.get_file_info(fs.FileSelector(path)):
        if is_generation(info.base_name) and info.base_name not in kept:
            system.delete_dir(info.path)
