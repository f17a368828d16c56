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
    KEPT,
    LINK,
    POINTER,
    Bucket,
    bucket_errors,
    copy,
    file_system,
    is_generation,
    is_link,
)
from radapter_serve.index.index import Index
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
    bucket = Bucket(url)
    with lock(folder, "radapter-index"):
        Index(folder)  # whole, or refused
        data = (folder / POINTER).read_bytes()
        generation = f"g-{hashlib.sha256(data).hexdigest()[:16]}"
        with contextlib.suppress(RAdapterError):
            if bucket.facts()[GENERATION] == generation:
                return False
        with bucket_errors(url):
            for part in (path for path in folder.iterdir() if path.is_dir()):
                copy(str(part), f"{bucket.path}/{generation}/{part.name}", down=False)
            system = file_system()
            with system.open_output_stream(f"{bucket.path}/{POINTER}") as file:  # seen when it is whole
                file.write(json.dumps({**json.loads(data), GENERATION: generation}).encode())
            _drop_old(system, bucket.path, generation)
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


def _drop_old(system: Any, path: str, generation: str) -> None:
    """Remove generations but for this one and the latest before it."""
    from pyarrow import fs

    found = system.get_file_info(fs.FileSelector(path, recursive=True))
    newest: dict[str, float] = {}
    for info in found:
        name = info.path.removeprefix(f"{path}/").partition("/")[0]
        if info.is_file and is_generation(name) and name != generation:
            newest[name] = max(newest.get(name, 0.0), info.mtime.timestamp())
    for name in sorted(newest, key=lambda one: newest[one])[: -(KEPT - 1)]:
        system.delete_dir(f"{path}/{name}")
