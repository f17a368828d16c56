"""The forms of an adapter and of the merged weights that other libraries open, as far as they are asked for."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from radapter_export.exported import Exported
from radapter_export.folder import NewFolder
from radapter_export.peft_folder import PeftFolder, check_low_rank
from radapter_export.settings import ExportSettings
from radapter_export.transformers_folder import TransformersFolder
from radapter_serve.adapter import Adapter
from radapter_serve.clip.base import Base
from radapter_serve.clip.transformers_form import form_of
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.release.agreement import TOLERANCES, Agreement, Samples
from radapter_serve.release.release import Release


def check_forms(settings: ExportSettings, adapter: Adapter) -> None:
    """Refuse forms that can't be, before anything is loaded.

    Raises:
        RAdapterError: a library is not installed, a folder is that of another form or inside it, or the adapter
            can't be a LoRA.
    """
    named = {"--merged": settings.merged, "--transformers": settings.transformers, "--peft": settings.peft}
    folders = {flag: Path(folder).absolute() for flag, folder in named.items() if folder}
    for (one, first), (other, second) in itertools.permutations(folders.items(), 2):
        if first == second or first in second.parents:
            raise RAdapterError(f"{other} {second} is the folder of {one}, or inside it; give each a folder of its own")
    if settings.transformers or settings.peft:
        check_installed("transformers", "huggingface")
    if settings.peft:
        check_low_rank(adapter)


class Forms:
    """Folders in the making; they stand in temporary ones beside, until `commit`.

    Args:
        settings: name the folders.
        base: of the adapter, without it.
        adapter: that is exported.

    Raises:
        RAdapterError: the base has no such form, or a folder holds something that was not written here.
    """

    def __init__(self, settings: ExportSettings, base: Base, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self._state = dict(base.model.state_dict())
        self._transformers = TransformersFolder(settings.transformers) if settings.transformers else None
        self._peft = PeftFolder(settings.peft) if settings.peft else None
        self._folders: list[NewFolder] = [folder for folder in (self._transformers, self._peft) if folder is not None]
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
        base, bounds, exported = self._base, self._bounds, []

        def add(kind: str, folder: TransformersFolder | PeftFolder, write: Callable[[], Agreement]) -> None:
            say(f"writing and checking the form of {kind} at alpha {alpha:g}")
            start = time.perf_counter()
            found = write()
            exported.append(Exported(kind, folder.size(name), found, time.perf_counter() - start))

        if (form := self._form) is None:
            return []
        if (plain := self._transformers) is not None:
            add("transformers", plain, lambda: plain.add(name, base, form, folded, samples, bounds))
        if (lora := self._peft) is not None:
            add(
                "peft",
                lora,
                lambda: lora.add(name, base, form, self._state, self._adapter, alpha, samples, bounds),
            )
        return exported

    def add_release(self, name: str, release: Release) -> None:
        """Write `release.json` beside each form."""
        for folder in self._folders:
            folder.add_release(name, release)

    def commit(self) -> None:
        """Put all of them in place."""
        for folder in self._folders:
            folder.commit()
