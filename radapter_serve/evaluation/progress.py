"""The progress of long work: one line on a terminal that changes, or plain lines now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

Say = Callable[[str], None]
INTERVAL = 10.0  # seconds between two plain lines


@contextmanager
def status(
    console: Console, *, show: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Say]:
    """Yields a function that shows a line: on a terminal one line that changes, elsewhere a plain
    line every ten seconds of the clock. `show` False shows nothing.
    """
    if not show:
        yield lambda line: None
        return
    if console.is_terminal:
        with console.status("starting") as shown:
            yield lambda line: shown.update(escape(line))
        return
    printed = clock()

    def say(line: str) -> None:
        nonlocal printed
        now = clock()
        if now - printed >= INTERVAL:
            printed = now
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield say
