"""A clock that a test sets."""

from __future__ import annotations


class FakeClock:
    """Stands still, but for what is slept by it.

    Attributes:
        now: seconds.
        slept: the waits, in seconds.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
