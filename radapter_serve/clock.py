"""The clock as a parameter: a test passes one that it sets."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the module `time` has of a clock."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


SYSTEM: Clock = time
