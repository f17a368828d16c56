"""A clock that a test sets."""

from __future__ import annotations


class FakeClock:
    """Moves by what is slept, and when a test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0  # seconds
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
