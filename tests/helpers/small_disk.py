"""A disk that is small, or that nobody can write: a tmpfs, which only root can mount."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A disk of its own at a folder."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    def fill(self, leave: int = 0) -> None:
        """Fill it with one file, `ballast`, but for so many bytes."""
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize - leave
        with (self.folder / "ballast").open("wb") as file:
            file.write(bytes(free))

    def empty(self) -> None:
        """Take the ballast away."""
        (self.folder / "ballast").unlink()

    def read_only(self) -> None:
        _mount("-o", "remount,ro", str(self.folder))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
    """A disk of this size, such as "4m", at a folder until the end of the block."""
    disk = SmallDisk(folder, size)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*words: str) -> None:
    process = subprocess.run(["mount", *words], capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"no disk can be mounted here, which takes root: {process.stderr.strip()}")
