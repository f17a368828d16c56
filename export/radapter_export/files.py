"""Folders that appear whole or not at all, and disk errors said in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.files import remove
from radapter_serve.lock import lock

SafetensorError: Any
try:
    from safetensors import SafetensorError
except ImportError:  # where releases are served, and no checkpoint is written
    SafetensorError = OSError

STAGED = ".export-"  # Triton ignores folders inside a model's folder whose names are no numbers


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, and whatever else the system refuses, into an error for people."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            message = (
                f"no space left on the disk of {folder}; free some and run radapter-export again"
            )
        else:
            message = f"cannot write to {folder}: {error}"
        raise RAdapterError(f"{message} (nothing half-written was left)") from error


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that are new, outermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return new


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that `make_folder` made, those that stayed empty."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def replaced(folder: Path) -> Path:
    """Where a folder goes while another one takes its place."""
    return folder.with_name(f"{STAGED}{folder.name}.old")


def recover(folder: Path, flag: str) -> None:
    """Undo what a killed `swap_in` or its preparations left beside a folder.

    Args:
        folder: whose leftovers they are.
        flag: of the command that names it.

    Raises:
        RAdapterError: whoever prepares it is alive, and holds what it prepares.
    """
    old = replaced(folder)
    with contextlib.ExitStack() as held:
        leftovers = [path for path in folder.parent.iterdir() if _is_leftover(path.name, folder)]
        try:
            for leftover in leftovers:
                held.enter_context(lock(leftover, "radapter-export"))
        except RAdapterError:
            raise RAdapterError(
                f"another radapter-export is writing {folder}; wait for it, or give another folder"
                f" with {flag}"
            ) from None
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in leftovers:
            remove(leftover)


def _is_leftover(name: str, folder: Path) -> bool:
    """Whether it is of this folder, and not of one whose name goes on after a dot."""
    begin, dot, end = name.rpartition(".")
    return f"{begin}{dot}" == f"{STAGED}{folder.name}." and (end.isdigit() or end == "old")
