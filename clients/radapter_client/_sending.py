"""Sends requests in threads, and retries them when no server answers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

from ._arguments import check_seconds
from ._wire import Request, Transport
from .failures import RAdapterClientError, ServerUnavailable, Timeout

Part = Callable[[], Request]  # makes a request, in the thread that sends it
Limit = Callable[[], float]  # seconds that a request which begins now may take
FIRST_WAIT = 0.1  # seconds before the first retry; doubled for each further one, up to
LAST_WAIT = 5.0
# Set when a call of `AsyncClient` is cancelled; each call has its own event.
CANCELLED: ContextVar[threading.Event | None] = ContextVar("CANCELLED", default=None)


class Sender:
    """Sends the requests of a client, at most `concurrency` at once."""

    def __init__(
        self,
        transport: Transport,
        *,
        timeout: float,
        retries: int,
        concurrency: int,
        progress: bool,
    ) -> None:
        self._transport = transport
        self._timeout = timeout
        self._retries = retries
        self._progress = progress
        self._closed = False
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="radapter-client")

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

    def check_open(self) -> None:
        """Raise an error if the client is closed."""
        if self._closed:
            raise RAdapterClientError("the client is closed; make a new one")

    def limit(self, timeout: float | None) -> Limit:
        """The limit of a call's requests: what is left of the call's time-out, and without one the
        client's own for each, as a list may take hours.
        """
        if timeout is None:
            return lambda: self._timeout
        end = time.monotonic() + check_seconds(timeout)
        return lambda: end - time.monotonic()

    def ask(self, parts: Sequence[Part], limit: Limit) -> list[Any]:
        """Send requests and return their replies, in order, each within the limit."""
        self.check_open()
        cancelled = CANCELLED.get()
        send = partial(self._send, limit=limit, cancelled=cancelled)
        try:
            # A single request is sent in the caller's thread, so that `concurrency` is for lists.
            if len(parts) == 1:
                return [send(parts[0])]
            replies = self._threads.map(send, parts)
            if not self._progress:
                return list(replies)
            from rich.console import Console  # imported here, as few calls show a bar
            from rich.progress import track

            console = Console(stderr=True)
            looked_at = console.is_terminal or console.is_jupyter
            bar = partial(track, console=console, transient=True, disable=not looked_at)
            return list(bar(replies, "asking", len(parts)))
        except Exception as error:
            # Each protocol fails in another way when its connection is closed.
            if self._closed:
                raise RAdapterClientError(
                    "the client was closed in the middle of a call"
                ) from error
            raise

    def _send(self, part: Part, limit: Limit, cancelled: threading.Event | None) -> Any:
        """Send a request, which only reads, and again while no server answers; a time-out is not
        retried.
        """
        if cancelled is not None and cancelled.is_set():
            raise RAdapterClientError("the call was cancelled")
        request = part()
        seconds = limit()
        if seconds <= 0:
            raise Timeout("the call's time-out is over, and not all of it was answered")
        # That no server answers is an answer to "ready".
        retries = 0 if request.action == "ready" else self._retries
        wait = FIRST_WAIT
        end = time.monotonic() + seconds
        while True:
            try:
                return self._transport.send(request, seconds)
            except ServerUnavailable as error:
                # Back off, at least as long as the server asks for.
                pause = max(wait * random.uniform(0.5, 1), error.retry_after)
                seconds = end - time.monotonic() - pause
                stopped = self._closed or (cancelled is not None and cancelled.is_set())
                if not retries or seconds <= 0 or stopped:
                    raise
            # Cancelling a call of `AsyncClient` ends this wait.
            if cancelled is None:
                time.sleep(pause)
            elif cancelled.wait(pause):
                raise RAdapterClientError("the call was cancelled")
            retries -= 1
            wait = min(2 * wait, LAST_WAIT)
