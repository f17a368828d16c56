"""The forms of the merged weights that other libraries open, as far as they are asked for."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from radapter_export.exported import Exported
from radapter_export.folder import Card
from radapter_export.settings import ExportSettings
from radapter_export.transformers_folder import TransformersFolder
from radapter_serve.clip.base import Base
from radapter_serve.clip.transformers_form import form_of
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.release.agreement import TOLERANCES, Samples
from radapter_serve.release.release import Release


def check_forms(settings: ExportSettings) -> None:
    """Refuse forms that can't be, before anything is loaded.

    Raises:
        RAdapterError: a library is not installed, or a folder is that of another form or inside it.
    """
    named = {"--merged": settings.merged, "--transformers": settings.transformers}
    folders = {flag: Path(folder).absolute() for flag, folder in named.items() if folder}
    for (one, first), (other, second) in itertools.permutations(folders.items(), 2):
        if first == second or first in second.parents:
            raise RAdapterError(
                f"{other} {second} is the folder of {one}, or inside it; give each a folder of"
                " its own"
            )
    if settings.transformers:
        check_installed("transformers", "huggingface")


class Forms:
    """Folders in the making; they stand in temporary ones beside, until `commit`.

    Args:
        settings: name the folders.
        base: of the adapter, without it.

    Raises:
        RAdapterError: the base has no such form, or a folder holds something that was not written
            here.
    """

    def __init__(self, settings: ExportSettings, base: Base) -> None:
        self._base = base
        folders = [settings.transformers] if settings.transformers else []
        self._folders = [TransformersFolder(folder) for folder in folders]
        self._form = form_of(base) if self._folders else None
        # The weights stay in fp32, whatever the precision of the graphs.
        self._bounds = settings.bounds if settings.precision == "fp32" else TOLERANCES["fp32"]
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Forms:
        try:
            for folder in self._folders:
                self._held.enter_context(folder)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def __bool__(self) -> bool:
        return bool(self._folders)

    def write(
        self,
        name: str,
        alpha: float,
        folded: Mapping[str, Tensor],
        samples: Mapping[str, Samples],
        say: Callable[[str], None],
    ) -> list[Exported]:
        """Write and check all forms of one release.

        Args:
            name: of its subfolder, "" for none.
            alpha: its re-scaling.
            folded: its weights, by open_clip's names.
            samples: of `image_encoder` and `text_encoder` at this α alone.
            say: called with a line before each form.
        """
        exported: list[Exported] = []
        if self._form is None:
            return exported
        for folder in self._folders:
            say(f"writing and checking the form of transformers at alpha {alpha:g}")
            start = time.perf_counter()
            found = folder.add(name, self._base, self._form, folded, samples, self._bounds)
            seconds = time.perf_counter() - start
            exported.append(Exported("transformers", folder.size(name), found, seconds))
        return exported

    def add_release(self, name: str, release: Release, card: Card | None = None) -> None:
        """Write `release.json` beside each form, and a card where one is wanted."""
        for folder in self._folders:
            folder.add_release(name, release, card)

    def commit(self) -> None:
        """Put all of them in place."""
        for folder in self._folders:
            folder.commit()
