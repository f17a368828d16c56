"""Whether the files of an index's table are those that were written: by their sizes and digests, in `index.json`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from radapter_serve.files import as_text, digest_of

#: up to so many bytes of a table are compared each time it is opened: a second or two; of a larger
#: one, the small files
CHECKED_AT_OPEN = 1 << 30
_SMALL = 16 << 20  # bytes of a file
_READ = ("data/*", "_deletions/*", "_versions/*.manifest")
_WORKERS = 4  # the disk, more than the processor, sets the pace of more

Files = Mapping[str, Mapping[str, Any]]


class DamagedFileError(Exception):
    """A file is not as it was written."""


def files_of(folder: Path, known: Files) -> dict[str, dict[str, Any]]:
    """The size and digest of each file of a table, by its path from there.

    Args:
        folder: of the table, whose files never change once they are written.
        known: what is known of some of them; those of the same name and size are not read again.
    """
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    found = {}
    for name, size in sorted(sizes.items()):
        same = known.get(name)
        digest = same["digest"] if same and same["size"] == size else digest_of(folder / name)
        found[name] = {"size": size, "digest": digest}
    return found


def check_files(folder: Path, files: Files, *, complete: bool) -> None:
    """Compare a table's files with their sizes and digests.

    A file that is gone is no matter here: older versions of the table are tidied away, and LanceDB
    misses what it needs.

    Args:
        folder: of the table.
        files: as of `files_of`.
        complete: whether all files are read, however large; else as CHECKED_AT_OPEN says.

    Raises:
        DamagedFileError: one differs; names it.
    """
    there = {name: said for name, said in files.items() if (folder / name).is_file()}
    every = complete or sum(said["size"] for said in there.values()) <= CHECKED_AT_OPEN
    read = {name: said for name, said in there.items() if every or said["size"] < _SMALL}
    differing = {name for name, said in there.items() if (folder / name).stat().st_size != said["size"]}
    digest = _digest if complete else _known_digest
    with ThreadPoolExecutor(_WORKERS) as pool:
        for name, now in zip(read, pool.map(lambda name: digest(folder / name), read), strict=True):
            if now != read[name]["digest"]:
                differing.add(name)
    if differing:
        names = ", ".join(as_text(name) for name in sorted(differing)[:3])
        raise DamagedFileError(f"{names} in {as_text(folder.name)} is not as it was written")


def _files(folder: Path) -> list[Path]:
    """The files that are read of a version; beside them LanceDB has a log, and a hint that it writes again."""
    return [path for pattern in _READ for path in folder.rglob(pattern) if path.is_file()]


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        return f"{error.strerror}"


def _known_digest(path: Path) -> str:
    state = path.stat()
    return _digest_of_state(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(4096)
def _digest_of_state(path: Path, *_: int) -> str:
    """Of a file that was not touched since: an index that grows is opened again and again."""
    return _digest(path)
