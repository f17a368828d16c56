"""Names of classes for prompts: the data's own, those of a class file, or CLIP's for ImageNet; and
the class files of masks, which name ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from radapter_serve.contract.labels import join_label, read_label_file, split_label
from radapter_serve.errors import RAdapterError, reason

IMAGENET = "imagenet"
IGNORED_NAMES = ("unlabeled", "void", "ignore")
_CLASS_FILES = ("classes.txt", "classes.json", "classes.yaml")
_WORDNET_ID = re.compile(r"n\d{8}")


def imagenet_classes() -> dict[str, str]:
    """CLIP's name of each class of ImageNet, by its WordNet id and by its number as text; two names
    occur twice.
    """
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    names = open_clip.IMAGENET_CLASSNAMES
    ids = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    return {
        **dict(zip(ids, names, strict=True)),
        **{str(index): name for index, name in enumerate(names)},
    }


def refuse_wordnet_ids(names: Sequence[str]) -> None:
    """Refuse names that are all WordNet ids: CLIP can't read a prompt with "n01440764" in it."""
    if names and all(_WORDNET_ID.fullmatch(name) for name in names):
        raise RAdapterError(
            f"the classes are named by WordNet ids ({', '.join(names[:3])}, ...), which CLIP can't"
            f" read; give CLIP's names for them with --classes {IMAGENET}, or a file with lines"
            f" such as '{names[0]}: tench'"
        )


def prompt_names(
    keys: Sequence[str] | None,
    classes: Path | None,
    spec: str,
    *,
    by_name: bool,
    every_class: bool = True,
    whole: bool = False,
) -> tuple[list[str], list[str]]:
    """The key of each class, which the data calls it by, in the order of its labels, and its name
    for prompts with synonyms after commas.

    `classes` is a class file, `imagenet`, or None for the data's `keys`, in which underscores
    become spaces. A line of the file is `key: name for prompts` or a name alone. Where labels
    are names (`by_name`) rather than numbers of `keys`, the file has the classes and their order.
    `whole` keys are names of folders, in which a comma parts no synonyms. `every_class` refuses
    lines of the file that are no class of the data; else these classes are listed last.
    """
    if classes is None:
        if keys is None:
            raise RAdapterError(
                f"{spec} does not name its classes; give a file with one class a line: --classes"
                " FILE"
            )
        names = [key.replace("_", " ") for key in keys]
        if whole:
            names = [join_label([name]) for name in names]
    elif str(classes) == IMAGENET:
        keys, names = _of_imagenet(keys, spec)
    elif keys is None or by_name:
        lines = _read(classes, keys or ())
        keys = [key or line for key, line in lines]
        names = [line for _, line in lines]
        numbers = [str(index) for index in range(len(keys))]
        if all(key.isdecimal() for key in keys) and keys != numbers:
            raise RAdapterError(
                f"the class file {classes} must number its lines from 0 on, in order"
            )
    else:
        folders = set(keys) if whole else set()
        keys, names = _matched(keys, _read(classes, keys), classes, spec, every_class)
        names = [  # a line that is a folder's name and no more parts no synonyms
            join_label([line]) if line == key and key in folders else line
            for key, line in zip(keys, names, strict=True)
        ]
    for key, line in zip(keys, names, strict=True):
        if not split_label(line):
            raise RAdapterError(
                f"the class {key!r} of {spec} has no name for a prompt; rename it, or see --classes"
            )
    return list(keys), names


def _of_imagenet(keys: Sequence[str] | None, spec: str) -> tuple[Sequence[str], list[str]]:
    from timm.data.imagenet_info import ImageNetInfo

    known = imagenet_classes()
    ids = list(known)[:1000]
    if keys is None:
        return ids, [known[id_] for id_ in ids]
    # WordNet's names of the 1,000 classes in their order; some data spell a few of them otherwise.
    words = ImageNetInfo("imagenet-1k").label_descriptions()  # type: ignore[no-untyped-call]
    same = [set(split_label(a)) & set(split_label(b)) for a, b in zip(keys, words, strict=False)]
    if len(keys) == len(words) and sum(map(bool, same)) >= 900:
        return keys, [known[id_] for id_ in ids]
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise RAdapterError(
            f"{spec} has the class {unknown[0]!r} ({len(unknown)} such of {len(keys)}), which is no"
            f" class of ImageNet; --classes {IMAGENET} knows WordNet ids such as n01440764 and the"
            " numbers 0 to 999; for other data give a class file, or --classes none"
        )
    return keys, [known[key] for key in keys]


def _read(path: Path, keys: Sequence[str]) -> list[tuple[str | None, str]]:
    """The lines of a class file: the key before a colon, unless it is a part of a name, and the
    name.
    """
    lines: list[tuple[str | None, str]] = []
    for line in read_label_file(path):
        key, colon, name = line.partition(": ")
        plain = not colon or not split_label(name) or line in keys
        if plain or not set(split_label(line)).isdisjoint(keys):
            lines.append((None, line))
        else:
            lines.append((key.strip(), name.strip()))
    return lines


def _matched(
    keys: Sequence[str],
    lines: Sequence[tuple[str | None, str]],
    path: Path,
    spec: str,
    every_class: bool,
) -> tuple[list[str], list[str]]:
    """The keys and the line of each, in whatever order the file has them; last the lines that are
    left.
    """

    def plain(name: str) -> str:
        return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())

    # A whole line goes before a first name, and that before a synonym.
    index: dict[str, int] = {}
    for kind in (split_label, lambda line: split_label(line)[:1], lambda line: [line]):
        for number, (key, line) in enumerate(lines):
            index |= {plain(name): number for name in ([key] if key else kind(line))}
    index |= {key: number for number, (key, _) in enumerate(lines) if key}
    numbers = [index.get(key, index.get(plain(key), -1)) for key in keys]
    without = [key for key, number in zip(keys, numbers, strict=True) if number < 0]
    rest = [number for number in range(len(lines)) if number not in numbers]
    unused = [lines[number][0] or lines[number][1] for number in rest]
    if without or (unused and every_class) or len(set(numbers)) < len(numbers):
        raise RAdapterError(
            f"the class file {path} does not match the {len(keys)} classes of {spec}: without a"
            f" line: {some(without)}; without a class: {some(unused)}; write one line for each"
            f" class, such as '{(without or list(keys))[0]}: name for prompts'"
        )
    return [*keys, *unused], [lines[number][1] for number in (*numbers, *rest)]


def some(names: Sequence[str]) -> str:
    """Some names for a message, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "none"


def read_class_ids(path: Path) -> dict[int, str]:
    """Read a class file: one class a line, from id 0, or JSON or YAML that maps id to name."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        names = dict(enumerate(read_label_file(path)))
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise RAdapterError(
                    f"{path}, line {number} is blank: fill it (an id without a class is"
                    " `unlabeled`), or remove it"
                )
        return names
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RAdapterError(f"cannot read the classes {path}: {reason(error)}") from None
    wrong = f'{path} must map class ids to names, such as {{"0": "unlabeled", "1": "cat, kitty"}}'
    if not isinstance(values, dict) or not values:
        raise RAdapterError(wrong)
    for id_, name in values.items():
        if not str(id_).isdecimal() or not isinstance(name, str) or not split_label(name):
            raise RAdapterError(f"{wrong}; it has {id_!r}: {name!r}")
    return {int(id_): name for id_, name in values.items()}


def number_classes(names: Mapping[int, str]) -> tuple[dict[int, int], list[str]]:
    """The number of each id's class, and the classes in the order of these numbers, synonyms after
    commas.
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
    """The class file in a folder, or in the one around it."""
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
