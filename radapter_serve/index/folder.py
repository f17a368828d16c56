"""An index in a folder: generations next to each other, and a pointer to the current one.

`index.json` names the generation, a folder `g-...` next to it, which holds an `index.json` with the
facts and the files that a search maps. A generation never changes; to replace `index.json` is to
replace the index.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import as_text, digest_of, staged
from radapter_serve.index.facts import FACTS, FileFacts, IndexFacts, build_command
from radapter_serve.index.neighbours import CODES
from radapter_serve.index.table import ROWS, VECTORS, Table

GENERATION = "generation"
# Bytes of a generation up to which all its files are compared each time it is opened: a second or
# two. Of a larger one only the codes are, which FAISS reads without a check.
CHECKED_AT_OPEN = 1 << 30


def read_pointer(folder: Path) -> tuple[str, IndexFacts]:
    """Read the name of the current generation of a folder, and its facts."""
    path = folder / FACTS
    where = shlex.quote(str(folder))
    try:
        generation = json.loads(path.read_bytes())[GENERATION]
        if not is_generation(generation):
            raise ValueError(f"it names the generation {generation!r:.40}")
        path = folder / generation / FACTS
        return generation, IndexFacts.from_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RAdapterError(
            f"no index at {folder}; make one: radapter-index build PHOTOS --out {where}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = reason(error)
    # The source may be legible where other facts are not.
    source = "SOURCE"
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    ):
        facts = json.loads((folder / (pointed(folder) or "") / FACTS).read_bytes())
        source = shlex.quote(facts.get("plan", facts)["source"])
    raise RAdapterError(
        f"{path} can't be read ({why}); build it again: radapter-index build {source} --out {where}"
    )


def open_generation(folder: Path, generation: str, facts: IndexFacts, *, complete: bool) -> Table:
    """Open a generation to search it; `complete` compares all files with their digests, however
    large.
    """
    place = folder / generation
    try:
        check_files(place, facts.files, complete=complete)
        return Table(as_text(folder.name), place, facts)
    except RAdapterError as error:
        raise RAdapterError(
            f"the index {folder} can't be searched: {error}; build it again:"
            f" {build_command(folder, facts.plan)}"
        ) from None


def check_files(folder: Path, files: Mapping[str, FileFacts], *, complete: bool) -> None:
    """Compare files with their sizes and digests; without `complete`, of a large folder only the
    codes are read.
    """
    every = complete or sum(known.size for known in files.values()) <= CHECKED_AT_OPEN

    def is_same(name: str) -> bool:
        path = folder / name
        known = files[name]
        with contextlib.suppress(OSError):
            read = every or name == CODES
            same = path.stat().st_size == known.size
            return same and (not read or digest_of(path) == known.digest)
        return False

    with ThreadPoolExecutor(len(files) or 1) as pool:
        same = list(pool.map(is_same, files))
    damaged = [name for name, is_whole in zip(files, same, strict=True) if not is_whole]
    if damaged:
        raise RAdapterError(
            f"{', '.join(damaged)} in {as_text(folder.name)} is not as it was written"
        )


def describe_files(folder: Path) -> dict[str, FileFacts]:
    """The size and digest of each file that a search reads, by name."""
    paths = [folder / name for name in (ROWS, VECTORS, CODES)]
    return {
        path.name: FileFacts(path.stat().st_size, digest_of(path))
        for path in paths
        if path.is_file()
    }


def is_generation(name: Any) -> bool:
    """Whether a name is that of a generation."""
    return (
        isinstance(name, str)
        and len(name) == 18
        and name.startswith("g-")
        and name[2:].isalnum()
        and name.isascii()
    )


def generations_of(folder: Path) -> list[Path]:
    """The generations that a folder holds, current or not."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if is_generation(path.name)]


def install(new: Path, folder: Path, facts: IndexFacts, keep: datetime.timedelta) -> Path:
    """Make a finished folder the current generation, and return its new place. A reader meanwhile
    finds this one or the one before, which stays for the time `keep`.
    """
    generation = f"g-{secrets.token_hex(8)}"
    write_text(new / FACTS, facts.to_json())
    folder.mkdir(exist_ok=True)
    before = pointed(folder)
    new.rename(folder / generation)
    write_text(folder / FACTS, json.dumps({GENERATION: generation}))
    if before is not None:
        with contextlib.suppress(OSError):
            os.utime(folder / before)
    # Remove generations that were replaced long ago.
    for place in generations_of(folder):
        with contextlib.suppress(OSError):
            replaced = datetime.datetime.fromtimestamp(place.stat().st_mtime)
            if place.name != generation and datetime.datetime.now() - replaced > keep:
                shutil.rmtree(place)
    return folder / generation


def pointed(folder: Path) -> str | None:
    """The generation that a folder names, whether it is there or not; None if it names no
    generation.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        generation = json.loads((folder / FACTS).read_bytes())[GENERATION]
        return generation if is_generation(generation) else None
    return None


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
