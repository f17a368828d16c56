"""Values checked by the types of a dataclass."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def checker(kind: type[T]) -> TypeAdapter[T]:
    """Pydantic's checker of a class. Making one takes longer than most checks, so it is kept.

    Args:
        kind: a dataclass.
    """
    return _kept(kind)


@functools.cache
def _kept(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # which a client and a base installation have not

    return TypeAdapter(kind)
