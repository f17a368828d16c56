"""A graph that a runtime has loaded, whatever the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Graph:
    """A graph that a runtime has loaded: the names of its inputs, in its order, and of its outputs,
    and what runs it, from inputs by name and names of outputs to these.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Callable[[Mapping[str, NDArray[Any]], Sequence[str]], Sequence[NDArray[Any]]]
