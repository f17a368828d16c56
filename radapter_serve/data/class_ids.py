"""Class files of masks: which id in a mask is which class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.errors import RAdapterError, reason

IGNORED_NAMES = ("unlabeled", "void", "ignore")
_CLASS_FILES = ("classes.txt", "classes.json", "classes.yaml")


def read_class_ids(path: Path) -> dict[int, str]:
    """Read a class file: text (one class a line, from id 0), or JSON or YAML that maps id to name.

    Raises:
        RAdapterError: it can't be read or is no such mapping.
    """
    if path.suffix not in (".json", ".yaml", ".yml"):
        numbered = dict(enumerate(read_label_file(path)))
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        blank = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
        if blank is not None:
            raise RAdapterError(
                f"{path}, line {blank} is blank: fill it (an id without a class is `unlabeled`), or"
                " remove it"
            )
        return numbered
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise RAdapterError(f"cannot read the classes {path}: {reason(error)}") from None
    wrong = RAdapterError(
        f'{path} must map class ids to names, such as {{"0": "unlabeled", "1": "cat, kitty"}}'
    )
    if not isinstance(values, dict) or not values:
        raise wrong
    names: dict[int, str] = {}
    for id_, name in values.items():
        if not str(id_).isdecimal() or not isinstance(name, str) or not split_label(name):
            raise RAdapterError(f"{wrong}; it has {id_!r}: {name!r}")
        names[int(id_)] = name
    return names


def number_classes(names: Mapping[int, str]) -> tuple[dict[int, int], list[str]]:
    """The number of each id's class, and the classes in the order of these numbers, synonyms after
    commas.

    Args:
        names: of the ids; those that are ignored get no number, ids of one name get one.

    Raises:
        RAdapterError: nothing is left.
    """
    entries: dict[str, str] = {}
    index: dict[int, int] = {}
    for id_, name in names.items():
        first = split_label(name)[0]
        if first.lower() in IGNORED_NAMES:
            continue
        entries.setdefault(first, join_label(split_label(name)))
        index[id_] = list(entries).index(first)
    if not index:
        raise RAdapterError("the classes name nothing but what is ignored; name one class or more")
    return index, list(entries.values())


def find_class_file(folder: Path) -> Path:
    """The class file in a folder or beside it."""
    if not folder.is_dir():
        raise RAdapterError(f"no folder {folder}; it should hold images/, masks/ and a class file")
    for parent in (folder, folder.parent):
        for name in _CLASS_FILES:
            if (parent / name).is_file():
                return parent / name
    raise RAdapterError(
        f"no {', '.join(_CLASS_FILES)} in {folder} or beside it; write one (one class a line, the"
        " first is id 0), or name a file: --classes FILE, or `classes` in a suite"
    )
