"""The classes of the benchmark, and which class a drawing's name means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from radapter_serve.inputs.labels import read_label_file, split_label

CLASSES = Path(__file__).with_name("classes.txt")
# words beside a class that leave what is drawn as it is: a camera that is off is a camera
BESIDE = frozenset(
    "a action actions add added alt alternate alternative and badge bare basic big black block blue body bottom button cancel "
    "charging check checked circle circles clean classic close closed color coloured crossed dashed delete device "
    "devices diagonal disable disabled dot dots dotted double down edit electronic electric emoji empty essential face "
    "facing five form four front full gold golden green half health high horizontal in interface large left less level "
    "list logo low medium mini minimal minimalistic minus mode modern more multiple new no of off ok old on one open "
    "orange out outer paper plain plus purple red remove removed retro right ring ringing rotate rotated shape side "
    "sign simple single six slash small spark square standard standing star straight style symbol the three tilt "
    "tilted tool top traditional triple two type up upright vertical vintage waving white wide with x xmark yellow".split()
) - {"with", "in", "of", "ring", "star", "form", "face", "list"}
# words that say that something else is drawn, too, or instead: "person in bed", "letter a", "flag of ..."
INSTEAD = frozenset(
    "alpha behind beside boy brand button couple girl hair hand hands holding in letter man men no number of over "
    "people person skin to under wearing with woman women".split()
)
MOST_WORDS = 3  # of a name whose last words are a class: "old alarm clock"


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


def class_of(words: str, classes: Mapping[str, str]) -> str | None:
    """The class that a drawing's name means, or None.

    It is named by a synonym, alone ("magnifying glass"), beside words that change nothing ("camera off"), or at the end
    of a few words that name no other class ("war axe"). One of many counts as one ("clouds").

    Args:
        words: of a drawing's name, without style and number.
        classes: synonym to class.
    """
    if found := _named(words, classes):
        return found
    parts = words.split()
    if not INSTEAD.isdisjoint(parts):
        return None
    mentions = _mentions(parts, classes)
    named = {classes_of for _, _, classes_of in mentions}
    if len(named) != 1:
        return None
    start, end, name = mentions[-1]
    beside = BESIDE.issuperset(parts[:start] + parts[end:])
    last = end == len(parts) and len(parts) <= MOST_WORDS
    return name if len(mentions) == 1 and (beside or last) else None


def _named(words: str, classes: Mapping[str, str]) -> str | None:
    return classes.get(words) or classes.get(words.removesuffix("s"))


def _mentions(parts: list[str], classes: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Where classes are named, longest names first, from the left: start, end, class; symbols such as + don't count."""
    found, start = [], 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            name = _named(" ".join(parts[start:end]), classes)
            if name and not (end - start == 1 and parts[start] in BESIDE):
                found.append((start, end, name))
                start = end - 1
                break
        start += 1
    return found
