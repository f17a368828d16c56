"""What waits is encoded together, and nobody waits for another's fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radapter_serve.contract.errors import OVERLOADED, TIMED_OUT, Cancelled, TaskError
from radapter_serve.encoders import queue
from radapter_serve.encoders.needs import Need, Result
from radapter_serve.encoders.queue import Queue
from radapter_serve.encoders.steps import Step, collected, step

WAIT = 20.0  # seconds, in which a test that works has long ended


def need(*rows: int, cancelled: Cancelled | None = None) -> Need:
    nothing: Any = None
    return Need(nothing, "tokens", rows, None, cancelled)


def doubled(needs: Sequence[Need]) -> list[Any]:
    return [[2 * row for row in one.rows] for one in needs]


class Held:
    """Doubles rows once it is let go; keeps the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

    def __call__(self, needs: Sequence[Need]) -> list[Any]:
        self.batches.append([row for one in needs for row in one.rows])
        self.begun.release()
        assert self.gate.wait(WAIT)
        return doubled(needs)


class Callers:
    """Threads that ask, each once the one before waits; what they got, or the error."""

    def __init__(self, asked: Queue) -> None:
        self.asked = asked
        self.found: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def ask(self, *numbers: int, cancelled: Cancelled | None = None) -> None:
        for number in numbers:
            before = len(self.asked._waiting)
            thread = threading.Thread(target=self._ask, args=(number, cancelled))
            thread.start()
            self._threads.append(thread)
            until(partial(has_waiting, self.asked, before + 1))

    def first(self, number: int, begun: threading.Semaphore) -> None:
        """Ask where nobody waits, until the encoder has begun."""
        thread = threading.Thread(target=self._ask, args=(number, None))
        thread.start()
        self._threads.append(thread)
        assert begun.acquire(timeout=WAIT)

    def join(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        return self.found

    def _ask(self, number: int, cancelled: Cancelled | None) -> None:
        try:
            [self.found[number]] = self.asked([need(number, cancelled=cancelled)])
        except BaseException as error:
            self.found[number] = error


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not there():
        assert time.monotonic() < end
        time.sleep(0.001)


def has_waiting(asked: Queue, count: int) -> bool:
    return len(asked._waiting) >= count


def answers(numbers: Iterable[int]) -> dict[int, list[int]]:
    return {number: [2 * number] for number in numbers}


def test_what_waits_makes_batches_of_at_most_so_many_rows() -> None:
    held = Held()
    callers = Callers(Queue(held, max_rows=3))
    callers.first(0, held.begun)
    callers.ask(1, 2, 3, 4)
    held.gate.set()
    assert callers.join() == answers(range(5))
    assert held.batches == [[0], [1, 2, 3], [4]]
    assert [*callers.asked([need(7)])] == [[14]]  # nothing is left behind that keeps others away


def test_more_than_may_wait_are_refused() -> None:
    held = Held()
    callers = Callers(Queue(held, max_rows=8, max_waiting=1))
    callers.first(0, held.begun)
    callers.ask(1)
    with pytest.raises(TaskError) as refused:
        callers.asked([need(2)])
    assert refused.value.code == OVERLOADED
    held.gate.set()
    assert callers.join() == answers([0, 1])


def test_who_gives_up_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
    held = Held()
    callers = Callers(Queue(held, max_rows=8))
    callers.first(0, held.begun)

    def too_late() -> bool:
        raise TaskError(TIMED_OUT, "no answer within the time-out")

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
        until(lambda: 0 in callers.found)
        return True

    callers.ask(1, cancelled=leaves)
    assert asked.acquire(timeout=WAIT)
    callers.ask(2)
    held.gate.set()
    found = callers.join()
    assert found.pop(1).code == "cancelled"
    assert found == answers([0, 2])


@pytest.mark.parametrize("interrupted", [0, 1])
def test_a_caller_who_is_interrupted_leaves_nobody_hanging(interrupted: int) -> None:
    """The first, or the one who encodes for all that wait; with it those of its batch get an
    error.
    """
    held = Held()

    def encode(needs: Sequence[Need]) -> list[Any]:
        found = held(needs)
        if interrupted in held.batches[-1]:
            raise KeyboardInterrupt
        return found

    callers = Callers(Queue(encode, max_rows=2))
    callers.first(0, held.begun)
    callers.ask(1, 2, 3)
    held.gate.set()
    found = callers.join()
    assert isinstance(found.pop(interrupted), KeyboardInterrupt)
    if interrupted == 1:
        assert found.pop(2).code == "internal_error"
    assert found == answers({1, 2} - {interrupted, 2 * interrupted} | {0, 3} - {interrupted})
    assert [*callers.asked([need(interrupted + 10)])] == [[2 * interrupted + 20]]


def test_all_who_are_encoded_together_have_the_steps_of_their_batch() -> None:
    held = Held()

    def encode(needs: Sequence[Need]) -> list[Any]:
        with step(f"batch of {len(needs)}"):
            return held(needs)

    asked = Queue(encode, max_rows=2)
    found: dict[int, list[Step]] = {}

    def ask(number: int) -> None:
        with collected() as steps:
            asked([need(number)])
        found[number] = steps

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for waiting, thread in enumerate(threads):
        thread.start()
        if not waiting:
            assert held.begun.acquire(timeout=WAIT)
        until(partial(has_waiting, asked, waiting))
    held.gate.set()
    for thread in threads:
        thread.join(WAIT)
    assert [one.name for one in found[0]] == ["batch of 1"]
    assert [one.name for one in found[1]] == ["batch of 2"] and found[1] == found[2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 8))
def test_everybody_gets_an_answer_of_their_own(rows: list[int], max_rows: int) -> None:
    sizes: list[int] = []
    busy = threading.Lock()

    def encode(needs: Sequence[Need]) -> list[Any]:
        assert busy.acquire(blocking=False)  # one batch at a time
        sizes.append(sum(len(one.rows) for one in needs) if len(needs) > 1 else 0)
        busy.release()
        return doubled(needs)

    asked = Queue(encode, max_rows=max_rows)
    found: dict[int, Result] = {}

    def one(number: int, size: int) -> None:
        [found[number]] = asked([need(*[number] * size)])

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert found == {number: [2 * number] * size for number, size in enumerate(rows)}
    assert max(sizes) <= max_rows
