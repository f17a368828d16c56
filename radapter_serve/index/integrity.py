"""Whether the files of an index are those that were written: by their sizes and digests, in
`index.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from radapter_serve.files import as_text, digest_of
from radapter_serve.index.facts import FileFacts

#: up to so many bytes of a folder are compared each time it is opened: a second or two; of a larger
#: one, the files of less than a 64th of that
CHECKED_AT_OPEN = 1 << 30
_SMALL_PART = 64  # of the limit: 16 MiB of 1 GiB
_READ = ("data/*", "_deletions/*", "_versions/*.manifest")
_MAX_KNOWN = 4096  # digests that are remembered
_known: dict[tuple[int, int, int, int], str] = {}
_WORKERS = 4  # the disk, more than the processor, sets the pace of more

Files = Mapping[str, FileFacts]


class DamagedFileError(Exception):
    """A file is not as it was written."""


def files_of(folder: Path, known: Files) -> dict[str, FileFacts]:
    """The size and digest of each file of a table, by its path from there.

    Args:
        folder: of the table, whose files never change once they are written.
        known: what is known of some of them; those of the same name and size are not read again.
    """
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    found = {}
    for name, size in sorted(sizes.items()):
        same = known.get(name)
        digest = same.digest if same and same.size == size else digest_of(folder / name)
        found[name] = FileFacts(size, digest)
    return found


def check_files(
    folder: Path,
    files: Files,
    *,
    complete: bool,
    always: Collection[str] = (),
    checked: int = CHECKED_AT_OPEN,
) -> None:
    """Compare files with their sizes and digests.

    Args:
        folder: of the files.
        files: as in `files_of`.
        complete: whether all files are read, however large.
        always: names of files that are read in any case.
        checked: bytes of a folder up to which all files are read; of a larger one, the files of
            less than a 64th of that.

    Raises:
        DamagedFileError: one is missing, or differs; names it.
    """
    every = complete or sum(said.size for said in files.values()) <= checked
    small = checked // _SMALL_PART
    read = [name for name, said in files.items() if every or said.size < small or name in always]
    differing = {name for name, said in files.items() if _size(folder / name) != said.size}
    digest = _digest if complete else _known_digest
    with ThreadPoolExecutor(_WORKERS) as pool:
        for name, now in zip(read, pool.map(lambda name: digest(folder / name), read), strict=True):
            if now != files[name].digest:
                differing.add(name)
    if differing:
        names = ", ".join(as_text(name) for name in sorted(differing)[:3])
        raise DamagedFileError(f"{names} in {as_text(folder.name)} is not as it was written")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _files(folder: Path) -> list[Path]:
    """The files that are read of a version; besides them LanceDB has a log, and a hint that it
    writes again.
    """
    return [path for pattern in _READ for path in folder.rglob(pattern) if path.is_file()]


def _digest(path: Path) -> str:
    try:
        return digest_of(path)
    except OSError as error:
        return f"{error.strerror}"


def _known_digest(path: Path) -> str:
    """Of a file that was not touched since it was read: an index that grows is opened again and
    again.
    """
    try:
        state = path.stat()
    except OSError as error:
        return f"{error.strerror}"
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _known:
        while len(_known) >= _MAX_KNOWN:
            _known.pop(next(iter(_known)), None)
        _known[key] = _digest(path)
    return _known[key]
