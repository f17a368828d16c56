"""Values checked by the types of a dataclass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
_made: dict[Any, TypeAdapter[Any]] = {}


def checker(kind: type[T]) -> TypeAdapter[T]:
    """Pydantic's checker of a dataclass; made once, as that takes longer than most checks."""
    from pydantic import TypeAdapter  # which a client and a base installation have not

    if kind not in _made:
        _made[kind] = TypeAdapter(kind)
    return _made[kind]
