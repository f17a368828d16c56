"""From a seed and a number to a hostile request, always the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

from tests.hostile import mutate
from tests.hostile.by_hand import Made, all_cases
from tests.hostile.case import Case

_WAYS: list[tuple[int, Callable[[Random], Case]]] = [
    (40, mutate.of_structure),
    (20, mutate.of_values),
    (20, mutate.of_body),
    (12, mutate.of_message),
    (8, mutate.of_noise),
]


def case(seed: int, number: int) -> Case:
    """The hostile request of a number: first the list made by hand, then mutations without end."""
    if number < len(by_hand()):
        return by_hand()[number][1]()
    random = Random(f"{seed}/{number}")
    (make,) = random.choices([way for _, way in _WAYS], [share for share, _ in _WAYS])
    return make(random)


@cache
def by_hand() -> list[Made]:
    """The list made by hand."""
    return all_cases()


def of_kind(kind: str) -> list[int]:
    """The numbers of those made by hand whose kind begins so."""
    return [number for number, (name, _) in enumerate(by_hand()) if name.startswith(kind)]
