"""Integrity of a release: a digest for every file.

The digests are in `classify/N/SHA256SUMS`, in the format of sha256sum. `sha256sum --check
classify/N/SHA256SUMS` compares them, too, if run in the folder of the model repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text, digest_of, staged
from radapter_serve.release.repository import MODELS

SUMS = "SHA256SUMS"
_WORKERS = 4  # with more, the disk limits the speed
_LINE = re.compile(rb"([0-9a-f]{64})  (.+)")
_SHOWN = 5  # most problems in a message
_ENGINE = "model.plan"  # in the names of files that radapter-build-engine adds later


def sums_of(repository: Path, version: int) -> Path:
    """Path of a release's digests."""
    return repository / "classify" / str(version) / SUMS


def write_sums(repository: Path, version: int) -> None:
    """Write the digests of all files of a release."""
    sums = {name: digest_of(path) for name, path in _files(repository, version).items()}
    with staged(sums_of(repository, version)) as path:
        path.write_bytes(written_sums(sums))


def renew_sums(repository: Path, version: int, names: Iterable[str]) -> None:
    """Update the digests of some files, such as `image_encoder/1/model.plan`."""
    path = sums_of(repository, version)
    sums = load_sums(path)
    for name in names:
        sums.pop(name, None)
        if (repository / name).is_file():
            sums[name] = digest_of(repository / name)
    with staged(path) as temporary:
        temporary.write_bytes(written_sums(sums))


def verify(
    repository: Path, version: int, progress: Callable[[str], None] = lambda line: None
) -> None:
    """Compare all files of a release with their digests; raises an error that names differences."""
    path = sums_of(repository, version)
    if path.exists():
        start = f"checking the files of release {version}"
        problems = differences(
            _files(repository, version),
            load_sums(path),
            lambda percent: progress(f"{start}: {percent} %"),
        )
    else:
        problems = {f"classify/{version}/{SUMS}, the list of its digests,": "is missing"}
    if problems:
        mend = "copy the release here again"
        if all(_ENGINE in name for name in problems):
            mend = f"build it again with radapter-build-engine {repository}"
        raise RAdapterError(
            f"release {version} in {repository} is not as it was exported: {shown(problems)};"
            f" {mend}, or export it again with radapter-export"
        )


def differences(
    files: Mapping[str, Path],
    sums: Mapping[str, str],
    progress: Callable[[int], None] = lambda percent: None,
) -> dict[str, str]:
    """Compare files with their digests; returns the problem of each wrong file by name."""
    problems = dict.fromkeys(sums.keys() - files.keys(), "is missing")
    problems |= dict.fromkeys(files.keys() - sums.keys(), "does not belong to it")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    total = max(sum(sizes.values()), 1)
    done = 0
    last = -1
    with ThreadPoolExecutor(_WORKERS) as pool:
        # Start with the large files, so that none of them is left to one worker at the end.
        order = sorted(sums.keys() & files.keys(), key=lambda name: -sizes[name])
        running = {pool.submit(digest_of, files[name]): name for name in order}
        for future in as_completed(running):
            name = running[future]
            done += sizes[name]
            if (percent := 100 * done // total) > last:
                last = percent
                progress(percent)
            if isinstance(future.exception(), OSError):
                problems[name] = "cannot be read"
            elif future.result() != sums[name]:
                problems[name] = "differs" if sizes[name] else "is empty"
    return problems


def shown(problems: Mapping[str, str]) -> str:
    """Format the first problems of files, and the number of the others."""
    lines = [f"{as_text(name)} {problem}" for name, problem in sorted(problems.items())]
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _files(repository: Path, version: int) -> dict[str, Path]:
    """List the files of a release by name, without its list of digests."""
    files = {}
    for model in MODELS:
        folder = repository / model / str(version)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).parts
            is_left = any(part == "__pycache__" or part.startswith(".") for part in inside)
            if path.is_file() and not is_left:
                files[str(PurePosixPath(model, str(version), *inside))] = path
    files.pop(f"classify/{version}/{SUMS}", None)
    return files


def written_sums(sums: Mapping[str, str]) -> bytes:
    """Format digests by file name as sha256sum does."""
    lines = [f"{digest.removeprefix('sha256:')}  {name}\n" for name, digest in sorted(sums.items())]
    return b"".join(map(os.fsencode, lines))


def load_sums(path: Path) -> dict[str, str]:
    """Read digests in the format of sha256sum."""
    sums = {}
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or line is rest:  # a last line without a line end is cut off
            raise RAdapterError(
                f"{path}, line {number}, is not a digest with the name of a file; copy the release"
                " here again, or export it again with radapter-export"
            )
        sums[os.fsdecode(match[2])] = f"sha256:{match[1].decode()}"
    return sums
