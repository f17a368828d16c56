"""A folder of checkpoints in the making, which appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import ClassVar, TypeVar

from radapter_export.files import STAGED, disk_errors, make_folder, recover, remove_empty, replaced
from radapter_serve.errors import RAdapterError
from radapter_serve.files import swap_in
from radapter_serve.lock import lock
from radapter_serve.release.release import FILE, Release

Self = TypeVar("Self", bound="NewFolder")


class NewFolder:
    """Checkpoints in the making: they stand in a temporary folder beside, until `commit`.

    Args:
        folder: where they shall be: one checkpoint, or a folder `alpha-0.5` for each of several.

    Attributes:
        flag: of the command that names the folder.
        files: all that a checkpoint may hold.

    Raises:
        RAdapterError: the folder holds something that was not written here, or another export is
            writing it.
    """

    flag: ClassVar[str]
    files: ClassVar[frozenset[str]]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._staged = self.folder.with_name(f"{STAGED}{self.folder.name}.{os.getpid()}")
        self._new: list[Path] = []
        self._held = contextlib.ExitStack()
        self._check_replaceable()

    def __enter__(self: Self) -> Self:
        with disk_errors(self.folder.parent):
            self._new = make_folder(self.folder.parent)
            with lock(
                self.folder.parent, "radapter-export"
            ):  # one after the other looks for others
                recover(self.folder, self.flag)
                self._held.enter_context(lock(self._staged, "radapter-export"))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)
        remove_empty(self._new)
        self._held.close()

    def staged(self, name: str) -> Path:
        """The temporary folder of a checkpoint: of `name`, a subfolder, or "" for the folder
        itself.
        """
        target = self._staged / name
        target.mkdir(exist_ok=True)
        return target

    def add_release(self, name: str, release: Release) -> None:
        """Write `release.json` beside a checkpoint."""
        with disk_errors(self.folder.parent):
            release.save(self._staged / name)

    def commit(self) -> None:
        """Put all of it in place."""
        with disk_errors(self.folder.parent):
            swap_in(self._staged, self.folder, replaced(self.folder))

    def _check_replaceable(self) -> None:
        """Refuse a path that holds anything but what was written here."""
        folder, ours = self.folder, {*self.files, FILE}
        if not folder.exists():
            return
        if not folder.is_dir():
            raise RAdapterError(f"{folder} is a file; give another folder with {self.flag}")
        for path in folder.iterdir():
            inside = {child.name for child in path.iterdir()} if path.is_dir() else set()
            if path.name not in ours and not (
                path.name.startswith("alpha-") and inside and inside <= ours
            ):
                raise RAdapterError(
                    f"{folder} holds {path.name}, which no export wrote; it would be replaced: give"
                    f" another folder with {self.flag}, or move that away"
                )
