"""The clock as a parameter: a test hands over one that it sets by itself."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What is asked of a clock."""

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary moment."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


SYSTEM = SystemClock()
