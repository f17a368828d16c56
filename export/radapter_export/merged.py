"""The merged checkpoint: a folder that open_clip loads by `local-dir:PATH`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError
from radapter_serve.files import disk_errors, staged, staged_folder
from radapter_serve.release.release import FILE, Release
from radapter_serve.sources import CARD

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES = (CONFIG, WEIGHTS, *TOKENIZER)
WRITER = "radapter-export"
DISK_ADVICE = "nothing half-written was left; make room for it, and run radapter-export again"


def write_merged(
    folder: str | Path,
    base: Base,
    state_dict: Mapping[str, Tensor],
    release: Release | None = None,
) -> None:
    """Write one merged checkpoint; it appears whole or not at all.

    Args:
        folder: where; an earlier merged checkpoint is replaced.
        base: gives configuration and preprocessing.
        state_dict: the folded weights, with exactly the base's keys.
        release: written out as `release.json`; None leaves that out.

    Raises:
        RAdapterError: the folder holds something else, or the disk is full.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder, "--merged", FILES)
    with (
        disk_errors(folder, DISK_ADVICE, (SafetensorError,)),
        staged_folder(folder, WRITER) as target,
    ):
        save_open_clip(target, base, state_dict)
        if release is not None:
            release.save(target)


def save_open_clip(folder: Path, base: Base, state_dict: Mapping[str, Tensor]) -> None:
    """Write weights, configuration and tokenizer as open_clip reads them."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in state_dict.items()}
    with staged(folder / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    config = {"model_cfg": base.config, "preprocess_cfg": base.preprocess}
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    # Where open_clip takes a tokenizer of Hugging Face, it looks for it in the folder.
    if isinstance(base.tokenizer, HFTokenizer):
        base.tokenizer.tokenizer.save_pretrained(folder, legacy_format=False)


def check_replaceable(folder: Path, flag: str, files: Collection[str]) -> None:
    """Refuse a path that holds anything but what an export writes there: `files`, release.json and
    a card, in the folder or in subfolders alpha-A; `flag` names the path in the message.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RAdapterError(f"{folder} is a file; give another folder with {flag}")

    def is_export(names: set[str]) -> bool:
        # A README.md without a release is somebody's own.
        return names <= {*files, FILE, *([CARD] if FILE in names else [])}

    inside = {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        children = {child.name for child in path.iterdir()} if path.is_dir() else set()
        is_alpha = path.name.startswith("alpha-") and children and is_export(children)
        if not is_alpha and not is_export({path.name} | (inside & {FILE})):
            raise RAdapterError(
                f"{folder} holds {path.name}, which no export wrote; it would be replaced: give"
                f" another folder with {flag}, or move that away"
            )
