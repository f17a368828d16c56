"""Integrity of a release: every file by its digest.

The digests lie in `classify/N/SHA256SUMS`, in the format of sha256sum. In the folder of the model
repository `sha256sum --check classify/N/SHA256SUMS` compares them, too.
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
_WORKERS = 4  # the disk, more than the processor, sets the pace of more
_LINE = re.compile(rb"([0-9a-f]{64})  (.+)")
_SHOWN = 5  # problems in a message
_ENGINE = "model.plan"  # the start of the names of what radapter-build-engine adds later


def sums_of(repository: Path, version: int) -> Path:
    """The path of a release's digests."""
    return repository / "classify" / str(version) / SUMS


def write_sums(repository: Path, version: int) -> None:
    """Write the digests of all files of a release."""
    _save(
        sums_of(repository, version),
        {name: digest_of(path) for name, path in _files(repository, version).items()},
    )


def renew_sums(repository: Path, version: int, names: Iterable[str]) -> None:
    """Write the digests of some files anew, such as `image_encoder/1/model.plan`."""
    path = sums_of(repository, version)
    sums = load_sums(path)
    for name in names:
        sums.pop(name, None)
        if (repository / name).is_file():
            sums[name] = digest_of(repository / name)
    _save(path, sums)


def verify(
    repository: Path, version: int, progress: Callable[[str], None] = lambda line: None
) -> None:
    """Compare all files of a release with their digests; names those that differ."""
    path = sums_of(repository, version)
    if not path.exists():
        raise _broken(
            repository, version, [f"{_name(path, repository)}, the list of its digests, is missing"]
        )
    sums = load_sums(path)
    found = _files(repository, version)
    problems = dict.fromkeys(sums.keys() - found.keys(), "is missing")
    problems |= dict.fromkeys(found.keys() - sums.keys(), "does not belong to it")
    sizes = {name: file.stat().st_size for name, file in found.items()}
    total = sum(sizes.values())
    done = 0
    told = -1
    with ThreadPoolExecutor(_WORKERS) as pool:
        # The large files first, so that no worker is left with one at the end.
        order = sorted(sums.keys() & found.keys(), key=lambda name: -sizes[name])
        running = {pool.submit(_digest, found[name]): name for name in order}
        for future in as_completed(running):
            name = running[future]
            done += sizes[name]
            if (percent := 100 * done // max(total, 1)) > told:
                told = percent
                progress(f"checking the files of release {version}: {percent} %")
            if (digest := future.result()) != sums[name]:
                problems[name] = (
                    "cannot be read" if digest is None else "differs" if sizes[name] else "is empty"
                )
    if problems:
        raise _broken(
            repository,
            version,
            [f"{as_text(name)} {why}" for name, why in sorted(problems.items())],
        )


def _files(repository: Path, version: int) -> dict[str, Path]:
    """The files of a release by name, without its list of digests."""
    found = {}
    for model in MODELS:
        folder = repository / model / str(version)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).parts
            if path.is_file() and not any(
                part == "__pycache__" or part.startswith(".") for part in inside
            ):
                found[str(PurePosixPath(model, str(version), *inside))] = path
    found.pop(_name(sums_of(repository, version), repository), None)
    return found


def _name(path: Path, repository: Path) -> str:
    return path.relative_to(repository).as_posix()


def _digest(path: Path) -> str | None:
    try:
        return digest_of(path)
    except OSError:
        return None


def written_sums(sums: Mapping[str, str]) -> bytes:
    """Digests by the names of their files, in the format of sha256sum."""
    lines = [f"{digest.removeprefix('sha256:')}  {name}\n" for name, digest in sorted(sums.items())]
    return b"".join(map(os.fsencode, lines))


def _save(path: Path, sums: Mapping[str, str]) -> None:
    with staged(path) as temporary:
        temporary.write_bytes(written_sums(sums))


def load_sums(path: Path) -> dict[str, str]:
    """Read digests in the format of sha256sum."""
    sums = {}
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        found = _LINE.fullmatch(line)
        if not found or line is rest:  # whose end is cut off
            raise RAdapterError(
                f"{path}, line {number}, is no digest with the name of a file; copy the release"
                " here again, or export it again with radapter-export"
            )
        sums[os.fsdecode(found[2])] = f"sha256:{found[1].decode()}"
    return sums


def _broken(repository: Path, version: int, problems: list[str]) -> RAdapterError:
    shown = "; ".join(problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    engines = all(_ENGINE in problem for problem in problems)
    mend = (
        f"build it again with radapter-build-engine {repository}"
        if engines
        else "copy the release here again"
    )
    return RAdapterError(
        f"release {version} in {repository} is not as it was exported: {shown}{more}; {mend}, or"
        " export it again with radapter-export"
    )
