"""Requests that wait are encoded together, and nobody waits for another's fault."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest

from radapter_serve.contract.errors import OVERLOADED, TIMED_OUT, Cancelled, TaskError
from radapter_serve.encoders.encoder import Span, collect_spans, span
from radapter_serve.encoders.loaded import Need
from radapter_serve.engine import engine as queue
from radapter_serve.engine.engine import Queue
from tests.helpers.fake_upstream import until

WAIT = 20.0  # seconds, in which a test that works has long ended


def need(*rows: int, cancelled: Cancelled | None = None) -> Need:
    nothing: Any = None
    return Need(nothing, "tokens", rows, None, cancelled)


def doubled(needs: Sequence[Need]) -> list[Any]:
    return [[2 * row for row in need.rows] for need in needs]


class Held:
    """Doubles rows once it is let go; keeps the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

    def __call__(self, needs: Sequence[Need]) -> list[Any]:
        self.batches.append([row for need in needs for row in need.rows])
        self.begun.release()
        assert self.gate.wait(WAIT)
        return doubled(needs)


class Callers:
    """Threads that ask, each once the one before waits, and their results or errors."""

    def __init__(self, asked: Queue) -> None:
        self.asked = asked
        self.futures: dict[int, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(8)

    def ask(self, *numbers: int, cancelled: Cancelled | None = None, rows: int = 1) -> None:
        for number in numbers:
            before = len(self.asked._waiting)
            self._submit(number, cancelled, rows)
            until(partial(has_waiting, self.asked, before + 1))

    def first(self, number: int, begun: threading.Semaphore) -> None:
        """Ask where nobody waits, until the encoder has begun."""
        self._submit(number)
        assert begun.acquire(timeout=WAIT)

    def join(self) -> dict[int, Any]:
        return {
            number: future.exception(WAIT) or future.result()[0]
            for number, future in self.futures.items()
        }

    def _submit(self, number: int, cancelled: Cancelled | None = None, rows: int = 1) -> None:
        asked = need(*[number] * rows, cancelled=cancelled)
        self.futures[number] = self._pool.submit(self.asked, [asked])


def has_waiting(asked: Queue, count: int) -> bool:
    return len(asked._waiting) >= count


def answers(numbers: Iterable[int]) -> dict[int, list[int]]:
    return {number: [2 * number] for number in numbers}


def test_what_waits_makes_batches_of_at_most_so_many_rows_and_more_are_refused() -> None:
    held = Held()
    callers = Callers(Queue(held, max_rows=3, max_waiting=4))
    callers.first(0, held.begun)
    for number in range(1, 5):
        callers.ask(number, rows=number)
    with pytest.raises(TaskError) as refused:
        callers.asked([need(5)])
    assert refused.value.code == OVERLOADED
    held.gate.set()
    assert callers.join() == {0: [0], 1: [2], 2: [4] * 2, 3: [6] * 3, 4: [8] * 4}
    assert held.batches == [[0], [1, 2, 2], [3] * 3, [4] * 4]  # one caller may have more
    assert [*callers.asked([need(7)])] == [[14]]  # nothing is left behind that keeps others away


def test_who_gives_up_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
    held = Held()
    callers = Callers(Queue(held, max_rows=8))
    callers.first(0, held.begun)
    too_late = Mock(side_effect=TaskError(TIMED_OUT, "no answer within the time-out"))
    for cancelled, code in ((lambda: True, "cancelled"), (too_late, TIMED_OUT)):
        with pytest.raises(TaskError) as error:
            callers.asked([need(1, cancelled=cancelled)])
        assert error.value.code == code
    callers.ask(2)
    held.gate.set()
    assert callers.join() == answers([0, 2])
    assert held.batches == [[0], [2]]  # nobody computes what nobody waits for


def test_who_gives_up_with_a_batch_in_hand_encodes_it_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
    held = Held()
    callers = Callers(Queue(held, max_rows=8))
    callers.first(0, held.begun)
    asked = threading.Semaphore(0)

    def leaves() -> bool:
        asked.release()
        # While this caller is asked, the first one ends, and hands the batch over to it.
        until(callers.futures[0].done)
        return True

    callers.ask(1, cancelled=leaves)
    assert asked.acquire(timeout=WAIT)
    callers.ask(2)
    held.gate.set()
    results = callers.join()
    assert results.pop(1).code == "cancelled"
    assert results == answers([0, 2])


@pytest.mark.parametrize("interrupted", [0, 1])
def test_a_caller_who_is_interrupted_leaves_nobody_hanging(interrupted: int) -> None:
    """One who encodes for all that wait takes those of its batch along: they get an error."""
    held = Held()

    def encode(needs: Sequence[Need]) -> list[Any]:
        results = held(needs)
        if interrupted in held.batches[-1]:
            raise KeyboardInterrupt
        return results

    callers = Callers(Queue(encode, max_rows=2))
    callers.first(0, held.begun)
    callers.ask(1, 2, 3)
    held.gate.set()
    results = callers.join()
    assert isinstance(results.pop(interrupted), KeyboardInterrupt)
    if interrupted == 1:
        assert results.pop(2).code == "internal_error"
    assert results == answers({1, 2} - {interrupted, 2 * interrupted} | {0, 3} - {interrupted})
    assert [*callers.asked([need(interrupted + 10)])] == [[2 * interrupted + 20]]


def test_all_who_are_encoded_together_have_the_spans_of_their_batch() -> None:
    held = Held()

    def encode(needs: Sequence[Need]) -> list[Any]:
        with span(f"batch of {len(needs)}"):
            return held(needs)

    asked = Queue(encode, max_rows=2)

    def ask(number: int) -> list[Span]:
        with collect_spans() as spans:
            asked([need(number)])
        return spans

    with collect_spans() as failed, pytest.raises(ValueError), span("failing"):
        raise ValueError
    assert [part.name for part in failed] == ["failing"]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, 0)
        assert held.begun.acquire(timeout=WAIT)
        others = [pool.submit(ask, number) for number in (1, 2)]
        until(partial(has_waiting, asked, 2))
        held.gate.set()
    assert [part.name for part in first.result()] == ["batch of 1"]
    assert [part.name for part in others[0].result()] == ["batch of 2"]
    assert others[0].result() == others[1].result()
