"""The steps of the work on a request in this process, with the steps inside them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

ENCODER = "_encoder"  # how the names of the steps end that are calls of an encoder


@dataclass(frozen=True)
class Step:
    """A part of the work on a request, with the steps inside it."""

    name: str  # "engine", a task or an encoder
    start: int  # in nanoseconds since 1970
    end: int
    parts: tuple[Step, ...] = ()


_taken: ContextVar[list[Step] | None] = ContextVar("steps", default=None)


@contextlib.contextmanager
def collected(into: list[Step] | None = None) -> Iterator[list[Step]]:
    """Yields the steps that this thread takes in the block, as they end; `into` a list, or a new
    one.
    """
    steps = [] if into is None else into
    token = _taken.set(steps)
    try:
        yield steps
    finally:
        _taken.reset(token)


def add(steps: Iterable[Step]) -> None:
    """Count steps that another thread took among those of this one, where these are collected."""
    taken = _taken.get()
    if taken is not None:
        taken.extend(steps)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Take a step of this thread, also where the block fails."""
    start = time.time_ns()
    began = time.monotonic_ns()  # the clock of the day may be set meanwhile
    try:
        with collected() as parts:
            yield
    finally:
        end = start + time.monotonic_ns() - began
        add([Step(name, start, end, tuple(parts))])


def encoder_ms(steps: Iterable[Step]) -> float:
    """The milliseconds of these steps in which an encoder ran."""
    total = 0.0
    for taken in steps:
        if taken.name.endswith(ENCODER):
            total += (taken.end - taken.start) / 1e6
        else:
            total += encoder_ms(taken.parts)
    return total
