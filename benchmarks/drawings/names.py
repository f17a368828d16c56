"""The classes of the benchmark, and which class a drawing's name means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from radapter_serve.contract.labels import read_label_file, split_label

CLASSES = Path(__file__).with_name("classes.txt")
SYNONYMS = Path(__file__).with_name("synonyms.txt")
_WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
BESIDE, INSTEAD, ONE_WAY = (
    frozenset(_WORDS[kind].split()) for kind in ("beside", "instead", "one_way")
)
MOST_WORDS = 3  # of a name whose last words are a class: "old alarm clock"


def load_meanings(path: Path) -> dict[str, str]:
    """What each name means. A line of the file is `meaning, synonyms for prompts | other names of
    drawings`.

    Raises:
        ValueError: one name has two meanings.
    """
    found: dict[str, str] = {}
    for line in read_label_file(path):
        names = split_label(line.replace("|", ","))
        for name in names:
            if found.setdefault(name, names[0]) != names[0]:
                raise ValueError(f"{path}: {name!r} means both {found[name]!r} and {names[0]!r}")
    return found


class Classes:
    """The benchmark's classes, and all names that drawings of them have.

    Attributes:
        names: of the classes, sorted, which is the order of their folders.
        prompt_lines: label lines in this order, synonyms after commas.
        meanings: what each known name means, a class or something else.
    """

    def __init__(self, classes: Path = CLASSES, synonyms: Path = SYNONYMS) -> None:
        own = load_meanings(classes)
        self.names = sorted(set(own.values()))
        lines = [line.partition("|")[0].strip() for line in read_label_file(classes)]
        self.prompt_lines = sorted(lines, key=lambda line: split_label(line)[0])
        self.meanings = {**load_meanings(synonyms), **own}
        self._known = frozenset(self.names)

    def of(self, words: str) -> str | None:
        """The class that a drawing's name means, or None.

        It is named by a synonym, alone ("magnifying glass"), beside words that change nothing
        ("camera off"), or at the end of a few words that name nothing else that is known ("war
        axe"). One of many counts as one ("clouds").

        Args:
            words: of a drawing's name, without style and number.
        """
        meaning = _named(words, self.meanings)
        parts = words.split()
        if meaning is None and INSTEAD.isdisjoint(parts):
            mentions = _mentions(parts, self.meanings)
            if len(mentions) == 1:
                start, end, named = mentions[0]
                last = end == len(parts) and len(parts) <= MOST_WORDS
                meaning = named if last or BESIDE.issuperset(parts[:start] + parts[end:]) else None
        return meaning if meaning in self._known else None


def core(words: str) -> str:
    """A name without the words that change nothing: "camera" of "camera off circle"."""
    return " ".join(word for word in words.split() if word not in BESIDE) or words


def _named(words: str, meanings: Mapping[str, str]) -> str | None:
    return meanings.get(words) or meanings.get(words.removesuffix("s"))


def _mentions(parts: list[str], meanings: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """What is named where, longest names first, from the left: start, end, meaning; of + and the
    like only its own.
    """
    found = []
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            meaning = _named(" ".join(parts[start:end]), meanings)
            if meaning and not (end - start == 1 and parts[start] in BESIDE):
                found.append((start, end, meaning))
                start = end - 1
                break
        start += 1
    return found
