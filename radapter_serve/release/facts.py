"""The facts of a release, `release.json`: found, read, and digested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radapter_serve.errors import RAdapterError

_DECIDING = (
    "base_digest",
    "adapter_digest",
    "alpha",
    "architecture",
    "preprocess",
    "tokenizer",
    "precision",
    "embed_dim",
)


def release_digest(facts: Mapping[str, Any]) -> str:
    """sha256 over what decides the embeddings: the same fold, exported again, has the same digest.

    So has a release whose α is an input, at the fold's α, but in int8: there its two summands are rounded apart.

    Args:
        facts: a release's `release.json`.

    Raises:
        RAdapterError: a fact that decides is missing.
    """
    missing = [name for name in _DECIDING if name not in facts]
    if missing:
        raise RAdapterError(f"the release does not say its {', '.join(missing)}; export it again with radapter-export")
    deciding = {name: facts[name] for name in _DECIDING}
    deciding["preprocess"] = {"exif_orientation": True, **facts["preprocess"]}  # which older releases do not say
    if facts.get("quantization"):  # of int8 alone
        deciding["quantization"] = facts["quantization"]
        if facts.get("dynamic_alpha"):
            deciding["dynamic_alpha"] = True
    text = json.dumps(deciding, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_release(folder: Path) -> dict[str, Any]:
    """A release's facts, `release.json` of the folder.

    Raises:
        RAdapterError: there is none, or it is no JSON.
    """
    path = folder / "release.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no names of facts")
    except (OSError, ValueError, RecursionError) as error:
        raise RAdapterError(f"could not read {path}: {error}") from error
    return facts


def split_repository(repository: str | Path) -> tuple[str, str]:
    """The folder of `DIR@N`, and the number of the release, which is empty where none is named."""
    path, at, number = str(repository).rpartition("@")
    return (path, number) if at and number.isdecimal() else (str(repository), "")


def find_release(repository: str | Path) -> Path:
    """The folder of a release in a model repository, that of its task `classify`.

    Args:
        repository: the model repository; `DIR@N` names release N, the newest otherwise.

    Raises:
        RAdapterError: no release there, or none of that number.
    """
    path, number = split_repository(repository)
    found = [int(p.parent.name) for p in Path(path, "classify").glob("*/release.json") if p.parent.name.isdecimal()]
    if not found:
        raise RAdapterError(f"no release in the model repository {path}; make one with radapter-export")
    if number and int(number) not in found:
        raise RAdapterError(f"no release {number} in {path}; it holds {', '.join(map(str, sorted(found)))}")
    return Path(path, "classify", str(int(number) if number else max(found)))
