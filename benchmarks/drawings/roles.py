"""Which set of drawings is for what: `roles.yaml`, read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROLES = Path(__file__).with_name("roles.yaml")


@dataclass(frozen=True)
class Style:
    """Drawings of one style, by several hands.

    Attributes:
        name: of the style, such as `two-tone`.
        sets: name of each set, with the style that its drawings' names must say; None takes all of
            them.
        paper: `white` or `black`, on which black drawings become white ones.
    """

    name: str
    sets: dict[str, str | None]
    paper: str = "white"


@dataclass(frozen=True)
class Roles:
    """Which set is for what.

    Attributes:
        fine_tuned: the style to fine-tune on.
        shifts: the styles that are tested on alone.
        base_validation: sets of the base's own validation.
        unused: sets for nothing.
        brands: those of them whose names are the brands to leave out of all other sets.
    """

    fine_tuned: Style
    shifts: tuple[Style, ...]
    base_validation: frozenset[str]
    unused: frozenset[str]
    brands: tuple[str, ...]

    @property
    def held_out(self) -> frozenset[str]:
        """The sets that no pair may come from."""
        return (
            frozenset(name for style in (self.fine_tuned, *self.shifts) for name in style.sets)
            | self.unused
        )


def load_roles(path: Path = ROLES) -> Roles:
    """Read the file of roles.

    Raises:
        ValueError: a set has two roles.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    styles = [
        Style(
            entry["name"],
            {item["set"]: item.get("style") for item in entry["sets"]},
            entry.get("paper", "white"),
        )
        for entry in (document["fine_tuned"], *document["shifts"])
    ]
    unused = [name for family in document["unused"] for name in family]
    named = [
        *(name for style in styles for name in style.sets),
        *document["base_validation"],
        *unused,
    ]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: {', '.join(twice)} stand twice; a set has one role")
    return Roles(
        styles[0],
        tuple(styles[1:]),
        frozenset(document["base_validation"]),
        frozenset(unused),
        tuple(document["brands"]),
    )
