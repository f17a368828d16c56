"""Signals that are handled in another way within a block, and as before after it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# kill, systemd, Kubernetes and a closed terminal stop a program by these; Windows lacks SIGHUP.
STOPPING: tuple[int, ...] = (
    signal.SIGTERM,
    *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Handle signals by `handler` within the block; an ignored one, as SIGHUP under nohup, stays
    ignored.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    if threading.current_thread() is not threading.main_thread():  # signals reach no other thread
        before = {}
    try:
        for number, usual in before.items():
            if usual != signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual or signal.SIG_DFL)
