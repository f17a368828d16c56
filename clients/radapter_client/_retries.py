"""How often a request is tried again, and how long to wait before that.

Every request only reads, so that what got no answer can be asked again. A time-out is not tried
again: it says that the server is slow, and the caller has waited long enough.
"""

from __future__ import annotations

import random
import time

from ._exceptions import ServerUnavailable

# seconds before the first repetition, and at most
FIRST = 0.1
MOST = 5.0


class Tries:
    """The tries of one request.

    Args:
        retries: repetitions at most.
        seconds: that all tries may take together, with the waits between them.
    """

    def __init__(self, retries: int, seconds: float) -> None:
        self._left = retries
        self._wait = FIRST
        self._end = time.monotonic() + seconds
        self.seconds = seconds  # for the next try

    def pause(self, error: ServerUnavailable) -> float:
        """Seconds to wait before the next try: longer each time, never less than the server asks
        for.

        Raises:
            ServerUnavailable: the one given, where no try or no time is left.
        """
        wait = max(self._wait * random.uniform(0.5, 1), error.retry_after)
        self._wait = min(2 * self._wait, MOST)
        self._left -= 1
        self.seconds = self._end - time.monotonic() - wait
        if self._left < 0 or self.seconds <= 0:
            raise error
        return wait
