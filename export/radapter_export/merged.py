"""A merged checkpoint: a folder that open_clip loads by `local-dir:PATH`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

from radapter_export.files import disk_errors
from radapter_export.folder import NewFolder
from radapter_serve.clip.base import Base
from radapter_serve.files import staged
from radapter_serve.release.release import Release

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}  # of Hugging Face


def write_merged(
    folder: str | Path, base: Base, state_dict: Mapping[str, Tensor], release: Release
) -> None:
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


class Merged(NewFolder):
    """Merged checkpoints in the making; see `NewFolder`."""

    flag = "--merged"
    library = "open_clip"
    files = frozenset({CONFIG, WEIGHTS, *TOKENIZER})

    def add(
        self,
        name: str,
        base: Base,
        state_dict: Mapping[str, Tensor],
        release: Release | None = None,
    ) -> None:
        """Write a checkpoint into the subfolder `name`, "" for the folder itself; `add_release` may
        follow later.
        """
        with disk_errors(self.folder.parent):
            target = self.staged(name)
            tensors = {key: tensor.detach().contiguous() for key, tensor in state_dict.items()}
            with staged(target / WEIGHTS) as path:
                save_file(tensors, path, metadata={"format": "pt"})
            config = {"model_cfg": base.config, "preprocess_cfg": base.preprocess}
            (target / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            if isinstance(
                base.tokenizer, HFTokenizer
            ):  # which open_clip looks for in the folder, whatever its name
                base.tokenizer.tokenizer.save_pretrained(target, legacy_format=False)
        if release is not None:
            self.add_release(name, release)
