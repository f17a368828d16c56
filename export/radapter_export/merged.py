"""A merged checkpoint: a folder that open_clip loads by `local-dir:PATH`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

from radapter_export.files import STAGED, disk_errors, make_folder, recover, remove_empty, replaced
from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged, swap_in
from radapter_serve.lock import lock
from radapter_serve.release.release import FILE, Release

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}  # of Hugging Face


def write_merged(folder: str | Path, base: Base, state_dict: Mapping[str, Tensor], release: Release) -> None:
    """Write one merged checkpoint; it appears whole or not at all.

    Args:
        folder: where; an earlier merged checkpoint is replaced.
        base: gives configuration and preprocessing.
        state_dict: the folded weights, with exactly the base's keys.
        release: written out as `release.json`.

    Raises:
        RAdapterError: the folder holds something else, or the disk is full.
    """
    with Merged(folder) as merged:
        merged.add("", base, state_dict, release)
        merged.commit()


class Merged:
    """Merged checkpoints in the making: they stand in a temporary folder beside, until `commit`.

    Args:
        folder: where they shall be: one checkpoint, or a folder `alpha-0.5` for each of several.

    Raises:
        RAdapterError: the folder holds something that was not written here, or another export is writing it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._staged = self.folder.with_name(f"{STAGED}{self.folder.name}.{os.getpid()}")
        self._new: list[Path] = []
        self._held = contextlib.ExitStack()
        check_replaceable(self.folder)

    def __enter__(self) -> Merged:
        with disk_errors(self.folder.parent):
            self._new = make_folder(self.folder.parent)
            with lock(self.folder.parent, "radapter-export"):  # one after the other looks for others
                recover(self.folder)
                self._held.enter_context(lock(self._staged, "radapter-export"))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)
        remove_empty(self._new)
        self._held.close()

    def add(self, name: str, base: Base, state_dict: Mapping[str, Tensor], release: Release | None = None) -> None:
        """Write a checkpoint into the subfolder `name`, "" for the folder itself; `add_release` may follow later."""
        target = self._staged / name
        with disk_errors(self.folder.parent):
            target.mkdir(exist_ok=True)
            tensors = {key: tensor.detach().contiguous() for key, tensor in state_dict.items()}
            with staged(target / WEIGHTS) as path:
                save_file(tensors, path, metadata={"format": "pt"})
            config = {"model_cfg": base.config, "preprocess_cfg": base.preprocess}
            (target / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            if isinstance(base.tokenizer, HFTokenizer):  # which open_clip looks for in the folder, whatever its name
                base.tokenizer.tokenizer.save_pretrained(target, legacy_format=False)
        if release is not None:
            self.add_release(name, release)

    def add_release(self, name: str, release: Release) -> None:
        """Write `release.json` beside a checkpoint."""
        with disk_errors(self.folder.parent):
            release.save(self._staged / name)

    def commit(self) -> None:
        """Put all of it in place."""
        with disk_errors(self.folder.parent):
            swap_in(self._staged, self.folder, replaced(self.folder))


def check_replaceable(folder: Path) -> None:
    """Refuse a path that holds anything but what `Merged` wrote.

    Raises:
        RAdapterError: names what is in the way.
    """
    if not folder.exists():
        return
    ours = {CONFIG, WEIGHTS, FILE, *TOKENIZER}
    if not folder.is_dir():
        raise RAdapterError(f"{folder} is a file; give another folder with --merged")
    for path in folder.iterdir():
        inside = {child.name for child in path.iterdir()} if path.is_dir() else set()
        if path.name not in ours and not (path.name.startswith("alpha-") and inside and inside <= ours):
            raise RAdapterError(
                f"{folder} holds {path.name}, which no export wrote; it would be replaced: give another folder "
                f"with --merged, or move that away"
            )
