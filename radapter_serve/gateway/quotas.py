"""What one key may ask, so that a caller with much to ask does not hold up the others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.gateway.errors import RATE_LIMITED, RETRY_AFTER, Refused
from radapter_serve.gateway.keys import Key


class Bucket:
    """So many (`limit`; None for any number) in a period of some seconds, as a token bucket: it is
    full at first, and fills up evenly.
    """

    def __init__(self, limit: float | None, period: float, clock: Clock) -> None:
        self._limit = limit
        self._period = period
        self._clock = clock
        self._size = max(1.0, limit or 0.0)
        self._left = self._size
        self._seen = clock.monotonic()

    def take(self, count: int = 1) -> float:
        """Take so many out and return 0; where the bucket lacks them, take nothing and return the
        seconds until they are there.
        """
        if self._limit is None:
            return 0.0
        # A full bucket gives more than it ever holds, and then has a debt to fill up.
        now = self._clock.monotonic()
        filled = (now - self._seen) * self._limit / self._period
        self._left = min(self._size, self._left + filled)
        self._seen = now
        lacking = min(count, self._size) - self._left
        if lacking > 1e-9:  # what rounding leaves is no lack
            return lacking * self._period / self._limit
        self._left -= count
        return 0.0


class Quota:
    """What is left of a key's limits."""

    def __init__(self, key: Key, clock: Clock = SYSTEM) -> None:
        self.key = key
        self._requests = Bucket(key.requests_per_second, 1.0, clock)
        self._images = Bucket(key.images_per_minute, 60.0, clock)
        self._running = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs, or raise `Refused` where it is too many or too soon."""
        key = self.key
        if key.at_once is not None and self._running >= key.at_once:
            raise self._refused(f"{key.at_once} requests at once", RETRY_AFTER)
        if seconds := self._requests.take():
            raise self._refused(f"{key.requests_per_second:g} requests a second", seconds)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def images(self, count: int) -> None:
        """Count the images of a request, or raise `Refused` where they are too many."""
        if seconds := self._images.take(count):
            raise self._refused(f"{self.key.images_per_minute:g} images a minute", seconds)

    def _refused(self, allowed: str, seconds: float) -> Refused:
        after = max(1, math.ceil(seconds))
        return Refused(
            429,
            RATE_LIMITED,
            f"the key {self.key.name} may send {allowed}; try again in {after} s",
            retry_after=after,
        )


class Quotas:
    """The quota of each key, which is new where the key's limits have changed."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._of: dict[str, Quota] = {}

    def of(self, key: Key) -> Quota:
        """The quota of a key."""
        found = self._of.get(key.name)
        if found is None or found.key != key:
            found = self._of[key.name] = Quota(key, self._clock)
        return found
