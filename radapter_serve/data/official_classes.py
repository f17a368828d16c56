"""The official class lists of A-847 and PC-459, made into class files of masks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radapter_serve.contract.labels import split_label
from radapter_serve.errors import RAdapterError, reason

_LINE = re.compile(r"(\d+)\s*:\s*(\S.*)")


def official_classes(path: Path) -> dict[int, str]:
    """Read an official list of classes.

    Args:
        path: a Python or JSON file with a list of `{"name", "trainId"}`, such as MaskFormer's
            `prepare_ade20k_full_sem_seg.py`, which is read and not run; or a text file with lines
            `N: name` from 1 on, such as Pascal Context's `labels.txt`, whose ids in prepared masks
            are one less.

    Returns:
        The name of each id in the masks, synonyms after commas. Where several classes share their
        first name, all but one begin with another of theirs, because a label is known by its first
        name.

    Raises:
        RAdapterError: the file can't be read, is no such list, or has classes that can't be told
            apart.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _lines(text) if path.suffix == ".txt" else _records(text, path.suffix)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise RAdapterError(f"could not read the class list {path}: {reason(error)}") from None
    return _told_apart(names, path)


def _lines(text: str) -> dict[int, str]:
    names = {
        int(found[1]) - 1: found[2].strip()
        for line in text.splitlines()
        if (found := _LINE.match(line.strip()))
    }
    if not names or min(names) < 0:
        raise ValueError("it has no lines such as '1: accordion', which count from 1")
    return names


def _records(text: str, suffix: str) -> dict[int, str]:
    """The first list of records with name and trainId."""
    if suffix == ".json":
        values = [json.loads(text)]
    else:
        lists = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.List))
        values = [value for node in lists if (value := _literal(node))]
    for value in values:
        if isinstance(value, list) and value and all(_is_record(row) for row in value):
            return {row["trainId"]: row["name"] for row in value}
    raise ValueError('it holds no list of {"name": "wall", "trainId": 0}')


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # of a list that is computed
        return None


def _is_record(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and bool(split_label(row["name"]))
        and type(row.get("trainId")) is int
        and row["trainId"] >= 0
    )


def _told_apart(names: Mapping[int, str], path: Path) -> dict[int, str]:
    synonyms = {id_: split_label(name) for id_, name in sorted(names.items())}
    firsts = [of[0] for of in synonyms.values()]
    # Those with one name alone come first: they have no other.
    taken: dict[str, int] = {}
    for id_, of in sorted(synonyms.items(), key=lambda item: len(item[1])):
        free = [name for name in of if name not in taken and (name == of[0] or name not in firsts)]
        if not free:
            raise RAdapterError(
                f"{path}: the classes {taken[of[0]]} and {id_} are both {of[0]!r}; give one of them"
                " a name of its own"
            )
        taken[free[0]] = id_
    first = {id_: name for name, id_ in taken.items()}
    return {id_: ", ".join(dict.fromkeys([first[id_], *of])) for id_, of in synonyms.items()}
