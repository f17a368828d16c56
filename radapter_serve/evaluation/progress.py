"""What an evaluation shows while it works: one line on a terminal, or plain lines now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from radapter_serve.clock import SYSTEM, Clock

Say = Callable[[str], None]
INTERVAL = 10.0  # seconds between two plain lines


@contextmanager
def status(console: Console, *, show: bool = True, clock: Clock = SYSTEM) -> Iterator[Say]:
    """Within the block the function that it yields shows a line about what is going on.

    Args:
        console: where to: on a terminal one line that changes, elsewhere a plain line every ten
            seconds.
        show: False shows nothing.
        clock: what the seconds are read from.
    """
    if not show:
        yield lambda line: None
    elif console.is_terminal:
        with console.status("starting") as shown:
            yield lambda line: shown.update(escape(line))
    else:
        yield _Lines(console, clock)


class _Lines:
    """Prints a line unless the last one was printed only just now."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._printed = clock.monotonic()

    def __call__(self, line: str) -> None:
        now = self._clock.monotonic()
        if now - self._printed >= INTERVAL:
            self._printed = now
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
