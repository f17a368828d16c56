"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Where to write a file: beside its place, which it takes at the end; whatever fails before leaves nothing.

    Its mode follows the umask, whoever writes it: safetensors makes files that only their owner can read.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def swap_in(staged: Path, folder: Path, old: Path) -> None:
    """Put a finished folder in the place of another one, or of none.

    Args:
        staged: the finished folder, on the same disk.
        folder: the place.
        old: where the other one goes before it is removed; what a killed call left there is removed first.
    """
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
