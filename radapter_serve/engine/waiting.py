"""Running together what callers ask for at the same time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from radapter_serve.contract.errors import INTERNAL_ERROR, OVERLOADED, TIMED_OUT, TaskError
from radapter_serve.engine import steps
from radapter_serve.engine.steps import Step
from radapter_serve.tasks.outcome import Outcome

R = TypeVar("R")
A = TypeVar("A")

MAX_WAITING = 128  # requests that wait for one task
PATIENCE_SECONDS = 2.0  # after which those that wait no longer wait for the batch that runs
MAX_LONG_BATCHES = 4  # that run at the same time, each of them longer than that


@dataclass(eq=False)
class _Caller(Generic[R, A]):
    """A caller in the queue.

    Attributes:
        wake: set once there is an outcome, or a batch that this caller is to run.
        batch: those whose requests it runs, itself among them.
        steps: of the batch in which it was run.
    """

    request: R
    rows: int
    wake: threading.Event = field(default_factory=threading.Event)
    batch: list[_Caller[R, A]] = field(default_factory=list)
    outcome: Outcome[A] | None = None
    steps: list[Step] = field(default_factory=list)


class Together(Generic[R, A]):
    """Runs what waits as one batch, in the thread of one of its callers: no thread is left behind.

    A caller who finds nobody running runs its own request at once. Who comes meanwhile waits; then
    the first of them runs all that wait, up to `max_rows`. One batch at a time uses all cores; but
    where it takes long, such as thousands of new labels do, the others start another beside it.

    Args:
        run: the outcomes of some requests; it is never called with none.
        max_rows: rows of a batch at most, unless one request has more.
        at_once: batches that run at the same time.
        max_waiting: requests that wait at most; more are refused.
        patience: seconds after which those that wait start another batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[R]], Sequence[Outcome[A]]],
        *,
        max_rows: int = 1,
        at_once: int = 1,
        max_waiting: int = MAX_WAITING,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._patience = patience
        self._run = run
        self._max_rows = max_rows
        self._at_once = at_once
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._queue: deque[_Caller[R, A]] = deque()
        self._running = 0

    def __call__(self, request: R, rows: int = 1, deadline: float | None = None) -> Outcome[A]:
        """The outcome of one request.

        Args:
            request: as `run` takes it.
            rows: that count for `max_rows`.
            deadline: of `time.monotonic`, after which the caller no longer waits.
        """
        caller: _Caller[R, A] = _Caller(request, rows)
        with self._lock:
            if self._running < self._at_once:
                self._running += 1
                caller.batch = [caller]
            elif len(self._queue) < self._max_waiting:
                self._queue.append(caller)
            else:
                return Outcome(
                    error=TaskError(OVERLOADED, "too many requests wait; ask again later")
                )
        if not caller.batch:
            try:
                self._wait(caller, deadline)
            except (
                BaseException
            ):  # such as Ctrl-C, where others wait for what this caller is to run
                if caller.batch:
                    self._lead(caller.batch)
                raise
        if caller.batch:
            self._lead(caller.batch)
        steps.add(caller.steps)
        if caller.outcome is None:
            return Outcome(error=TaskError(TIMED_OUT, "no answer within the time-out"))
        return caller.outcome

    def _wait(self, caller: _Caller[R, A], deadline: float | None) -> None:
        """Wait for an outcome, for a batch to run, or for the deadline."""
        end = math.inf if deadline is None else deadline
        impatient = time.monotonic() + self._patience
        try:
            while time.monotonic() < end:
                if caller.wake.wait(max(0.0, min(impatient, end) - time.monotonic())):
                    return
                if time.monotonic() < impatient:
                    continue
                impatient = time.monotonic() + self._patience
                with self._lock:
                    is_first = bool(self._queue) and self._queue[0] is caller
                    if is_first and self._running < self._at_once + MAX_LONG_BATCHES:
                        self._running += 1
                        caller.batch = self._take()
                        return
        finally:
            with self._lock:
                if caller in self._queue:
                    self._queue.remove(caller)

    def _lead(self, batch: list[_Caller[R, A]]) -> None:
        """Run a batch, and hand over to the first who waits."""
        taken: list[Step] = []
        try:
            with steps.collected(taken):
                outcomes = self._run([one.request for one in batch])
            for one, outcome in zip(batch, outcomes, strict=True):
                one.outcome = outcome
        finally:
            for one in batch:
                one.steps = taken
                if one.outcome is None:  # such as Ctrl-C in the thread of the caller who ran it
                    error = TaskError(INTERNAL_ERROR, "the batch of this request was given up")
                    one.outcome = Outcome(error=error)
            self._hand_over()
            for one in batch:
                one.wake.set()

    def _hand_over(self) -> None:
        with self._lock:
            if not self._queue or self._running > self._at_once:
                self._running -= 1
                return
            first = self._queue[0]
            first.batch = self._take()
        first.wake.set()

    def _take(self) -> list[_Caller[R, A]]:
        """The next batch from the queue, which is not empty."""
        batch = [self._queue.popleft()]
        rows = batch[0].rows
        while self._queue and rows + self._queue[0].rows <= self._max_rows:
            rows += self._queue[0].rows
            batch.append(self._queue.popleft())
        return batch
