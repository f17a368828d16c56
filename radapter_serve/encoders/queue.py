"""The queue of one encoder: rows that callers of several threads need are encoded together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from radapter_serve.contract.errors import (
    INTERNAL_ERROR,
    OVERLOADED,
    TaskError,
    check_cancelled,
)
from radapter_serve.encoders.encoder import Step, add_steps, collected
from radapter_serve.encoders.loaded import Need, Result

MAX_WAITING = 128  # callers of one encoder
POLL_SECONDS = 0.2  # after which a caller who waits is asked again whether it still does


@dataclass(eq=False)
class _Caller:
    """A caller in the queue."""

    needs: Sequence[Need]
    # Set once there are results, or a batch that this caller is to encode.
    wake: threading.Event = field(default_factory=threading.Event)
    batch: list[_Caller] = field(default_factory=list)  # that it encodes, itself among them
    results: Sequence[Result] | None = None
    steps: list[Step] = field(default_factory=list)  # of the batch that its needs were in


class Queue:
    """Encodes what waits as one batch, in the thread of one of its callers.

    A caller who finds the encoder idle encodes at once. Others wait meanwhile; then the first of
    them encodes for all that wait, up to `max_rows` unless one caller has more. More callers than
    `max_waiting` are refused, and one who gives up leaves the queue.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Need]], Sequence[Result]],
        *,
        max_rows: int,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._encode = encode
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._waiting: deque[_Caller] = deque()
        self._is_busy = False

    def __call__(self, needs: Sequence[Need]) -> Sequence[Result]:
        """The results of one caller's needs; a `TaskError` where too many wait, or it gave up."""
        caller = _Caller(needs)
        with self._lock:
            if not self._is_busy:
                self._is_busy = True
                caller.batch = [caller]
            elif len(self._waiting) < self._max_waiting:
                self._waiting.append(caller)
            else:
                raise TaskError(OVERLOADED, "too many requests wait; ask again later")
        try:
            # Wait for results, or for a batch to encode.
            while not caller.batch and not caller.wake.wait(POLL_SECONDS):
                check_cancelled(needs[0].cancelled)
        finally:
            with self._lock:
                if caller in self._waiting:
                    self._waiting.remove(caller)
            # Also where this thread is interrupted: others wait for what it is to encode.
            if caller.batch:
                self._lead(caller.batch)
        add_steps(caller.steps)
        if caller.results is None:
            raise TaskError(INTERNAL_ERROR, "the batch of this request was given up")
        return caller.results

    def _lead(self, batch: list[_Caller]) -> None:
        """Encode a batch, and hand over to the first who waits."""
        needs = [need for caller in batch for need in caller.needs]
        try:
            with collected() as taken:
                results = list(self._encode(needs))
            for caller in batch:
                caller.steps = taken
                caller.results = results[: len(caller.needs)]
                results = results[len(caller.needs) :]
        finally:
            with self._lock:
                # The next batch of those who wait.
                following: list[_Caller] = []
                rows = 0
                while self._waiting:
                    rows += sum(len(need.rows) for need in self._waiting[0].needs)
                    if following and rows > self._max_rows:
                        break
                    following.append(self._waiting.popleft())
                self._is_busy = bool(following)
                if following:
                    following[0].batch = following
                    following[0].wake.set()
            for caller in batch:
                caller.wake.set()
