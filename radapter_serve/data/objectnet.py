"""ObjectNet's classes as ImageNet's: which of the 1,000 classes each of its 113 common ones stands
for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radapter_serve.data.classes import imagenet_classes
from radapter_serve.errors import RAdapterError, reason

_FOLDERS = "folder_to_objectnet_label.json"
_LABELS = "objectnet_to_imagenet_1k.json"
_NUMBERS = "pytorch_to_imagenet_2012_id.json"
_NAMES = "imagenet_to_label_2012_v2"


def objectnet_members(mappings: Path) -> dict[str, tuple[str, list[str]]]:
    """The classes that ObjectNet shares with ImageNet, as its own `mappings` say.

    The released code of WiSE-FT and of R-Adapter gives a class the best score of its ImageNet
    classes, so that a model is asked for the same 1,000 prompts as on ImageNet.

    Args:
        mappings: the folder that comes with ObjectNet.

    Returns:
        By the folder of a class: ObjectNet's name of it in lower case, and CLIP's names of its
            ImageNet classes.

    Raises:
        RAdapterError: a file is missing or broken, or the files do not match.
    """
    labels = _json(mappings, _LABELS)
    folder_of = {label: folder for folder, label in _json(mappings, _FOLDERS).items()}
    number_of = {id_: number for number, id_ in _json(mappings, _NUMBERS).items()}
    try:
        lines = (mappings / _NAMES).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(mappings / _NAMES, error) from None
    id_of = {line.strip(): id_ for id_, line in enumerate(lines)}
    clip = imagenet_classes()
    try:
        return {
            folder_of[label]: (
                label.lower(),
                [clip[number_of[id_of[name]]] for name in names.split("; ")],
            )
            for label, names in labels.items()
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise RAdapterError(
            f"the files in {mappings} do not match: {reason(error)} of {_LABELS} is missing in"
            f" {_FOLDERS}, {_NAMES} or {_NUMBERS}; take all four from one copy of ObjectNet"
        ) from None


def _json(folder: Path, name: str) -> Mapping[str, Any]:
    path = folder / name
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict) or not all(
        isinstance(value, str | int) for value in content.values()
    ):
        raise RAdapterError(f"{path} is no mapping of names; take it from ObjectNet again")
    return content


def _unreadable(path: Path, error: Exception) -> RAdapterError:
    why = error.strerror if isinstance(error, OSError) else reason(error)
    return RAdapterError(
        f"cannot read {path}: {why}; `mappings` comes with ObjectNet and holds {_LABELS} and three"
        " more"
    )
