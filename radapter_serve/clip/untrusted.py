"""Refuse a model's folder that may make a library run code, before any library reads it.

An adapter file names its base, and whoever made the file chose that name, so nothing in such a
folder is trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError, reason, short

# What open_clip's own configurations give to a tokenizer. It hands any other field on to
# `transformers`.
_TOKENIZER_FIELDS = (
    *("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask"),
)
_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation")
# Fields by which `transformers` imports code, reads another file in place of this one, or fetches a
# kernel.
_CODE_FIELDS = (
    *("auto_map", "trust_remote_code", "configuration_files", "custom_generate"),
    *("quantization_config", "use_kernels"),
)
_TIMM_NAME = re.compile(r"[\w.]+")


def check_folder(folder: Path) -> None:
    """Refuse a model's folder, of open_clip or `transformers`, that could run code; names the
    field.
    """
    _check_configs(folder)
    path = folder / "open_clip_config.json"
    config = _read(path) if path.is_file() else None
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return  # no configuration of open_clip's; whoever reads it says so
    image, text, multimodal = (
        _table(model, name) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")
    )
    for field in _table(text, "tokenizer_kwargs"):
        if field not in _TOKENIZER_FIELDS:
            allowed = f"allowed are {', '.join(_TOKENIZER_FIELDS)}"
            raise _refused(path, f"tokenizer_kwargs.{field}", allowed)
    name = image.get("timm_model_name")
    if name is not None and not _TIMM_NAME.fullmatch(str(name)):
        allowed = "allowed is the name of one of timm's models"
        raise _refused(path, f"timm_model_name {short(name)}", allowed)
    for tower in (text, multimodal):
        if tower.get("hf_model_name"):
            _check_configs(_folder_of_config(str(tower["hf_model_name"])))


def _check_configs(folder: Path) -> None:
    """Look into all configurations that `transformers` may read from a folder."""
    if (folder / "adapter_config.json").exists():
        raise RAdapterError(
            f"{folder} holds adapter_config.json, an adapter of peft: export it with --lora, or"
            " merge it into the weights and delete it"
        )
    for path in sorted(folder.glob("*config*.json")):
        for field, value in _fields(_read(path)):
            what = field
            if field in _ATTENTION and "/" in json.dumps(value):
                what = f"{field} {short(value)}"
            elif field not in _CODE_FIELDS:
                continue
            raise _refused(path, what, "a base may not bring code")


def _folder_of_config(name: str) -> Path:
    """The folder of the configuration of a text tower, fetched from the hub where it is none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub and the network raise many kinds
        where = f"the text tower {short(name)} from the Hugging Face hub"
        raise RAdapterError(f"could not get {where}: {reason(error)}") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RAdapterError(f"could not load {path}: it is no JSON ({reason(error)})") from error


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of a configuration with their values, at any depth."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _table(of: dict[str, Any], name: str) -> dict[str, Any]:
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _refused(path: Path, what: str, allowed: str) -> RAdapterError:
    return RAdapterError(f"{path} has {what}, by which a library may run foreign code; {allowed}")
