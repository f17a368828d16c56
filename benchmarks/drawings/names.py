"""The classes of the benchmark, and which class a drawing's name means."""

from __future__ import annotations

from pathlib import Path

from radapter_serve.inputs.labels import read_label_file, split_label

CLASSES = Path(__file__).with_name("classes.txt")


def load_classes(path: Path = CLASSES) -> dict[str, str]:
    """The class of every synonym, from a label file: a class a line, its synonyms after commas.

    Raises:
        ValueError: one word names two classes.
    """
    found: dict[str, str] = {}
    for line in read_label_file(path):
        names = split_label(line)
        for name in names:
            if found.setdefault(name, names[0]) != names[0]:
                raise ValueError(f"{path}: {name!r} names both {found[name]!r} and {names[0]!r}")
    return found
