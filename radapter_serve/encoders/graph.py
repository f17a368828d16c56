"""A graph that a runtime has loaded, whatever the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Graph:
    """A graph that a runtime has loaded.

    Attributes:
        inputs: their names, in the graph's order.
        outputs: their names.
        run: from inputs by name, and the names of outputs, to these outputs.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Callable[[Feed, Sequence[str]], Sequence[NDArray[Any]]]
