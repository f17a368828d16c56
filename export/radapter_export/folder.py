"""A folder of checkpoints in the making, which appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from radapter_export.files import STAGED, disk_errors, make_folder, recover, remove_empty, replaced
from radapter_serve.errors import RAdapterError
from radapter_serve.files import swap_in
from radapter_serve.hub import CARD
from radapter_serve.lock import lock
from radapter_serve.release.release import FILE, Release

Self = TypeVar("Self", bound="NewFolder")


class Card(Protocol):
    """Writes the model card of a release."""

    def __call__(self, release: Release, *, library: str) -> str:
        """The text of the card, for a folder that this library opens."""


class NewFolder:
    """Checkpoints in the making: they stand in a temporary folder beside, until `commit`.

    Args:
        folder: where they shall be: one checkpoint, or a folder `alpha-0.5` for each of several.

    Attributes:
        flag: of the command that names the folder.
        files: all that a checkpoint may hold, but for its facts and its card.
        library: that opens it.

    Raises:
        RAdapterError: the folder holds something that was not written here, or another export is
            writing it.
    """

    flag: ClassVar[str]
    files: ClassVar[frozenset[str]]
    library: ClassVar[str]

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

    def add_release(self, name: str, release: Release, card: Card | None = None) -> None:
        """Write `release.json` beside a checkpoint, and a card where one is wanted."""
        with disk_errors(self.folder.parent):
            release.save(self._staged / name)
            if card is not None:
                text = card(release, library=self.library)
                (self._staged / name / CARD).write_text(text, encoding="utf-8")

    def commit(self) -> None:
        """Put all of it in place."""
        with disk_errors(self.folder.parent):
            swap_in(self._staged, self.folder, replaced(self.folder))

    def _check_replaceable(self) -> None:
        """Refuse a path that holds anything but what was written here."""
        folder = self.folder
        if not folder.exists():
            return
        if not folder.is_dir():
            raise RAdapterError(f"{folder} is a file; give another folder with {self.flag}")
        names = {path.name for path in folder.iterdir()}
        for path in folder.iterdir():
            inside = {child.name for child in path.iterdir()} if path.is_dir() else set()
            if path.name not in self._ours(names) and not (
                path.name.startswith("alpha-") and inside and inside <= self._ours(inside)
            ):
                raise RAdapterError(
                    f"{folder} holds {path.name}, which no export wrote; it would be replaced: give"
                    f" another folder with {self.flag}, or move that away"
                )

    def _ours(self, names: set[str]) -> set[str]:
        """What an export writes into a folder that holds these; a README.md without a release is
        somebody's own.
        """
        return {*self.files, FILE, *([CARD] if FILE in names else [])}
