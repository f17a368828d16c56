"""What waits is run together, and nobody waits for another's fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from radapter_serve.engine.waiting import Together
from radapter_serve.tasks.outcome import Outcome

from radapter_serve.contract.errors import OVERLOADED, TIMED_OUT

WAIT = 20.0  # seconds, in which a test that works has long ended


class Held:
    """Doubles numbers once it is let go; keeps the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[Outcome[int]]:
        self.batches.append(list(numbers))
        self.begun.release()
        assert self.gate.wait(WAIT)
        return [Outcome(2 * number) for number in numbers]


def ask(together: Together[int, int], number: int, found: dict[int, Outcome[int]]) -> None:
    found[number] = together(number)


def callers(
    together: Together[int, int], numbers: Sequence[int], found: dict[int, Outcome[int]]
) -> list[threading.Thread]:
    """Threads that ask, each once the one before waits."""
    threads = []
    for number in numbers:
        before = len(together._queue)
        thread = threading.Thread(target=ask, args=(together, number, found))
        thread.start()
        threads.append(thread)
        end = time.monotonic() + WAIT
        while len(together._queue) == before and time.monotonic() < end:
            time.sleep(0.001)
    return threads


def test_what_waits_makes_batches_of_at_most_so_many_rows() -> None:
    held = Held()
    together = Together(held, max_rows=3)
    found: dict[int, Outcome[int]] = {}
    first = threading.Thread(target=ask, args=(together, 0, found))
    first.start()
    assert held.begun.acquire(timeout=WAIT)
    rest = callers(together, [1, 2, 3, 4], found)
    held.gate.set()
    for thread in (first, *rest):
        thread.join(WAIT)
    assert held.batches == [[0], [1, 2, 3], [4]]
    assert {number: one.unwrap() for number, one in found.items()} == {n: 2 * n for n in range(5)}
    assert together(7).unwrap() == 14  # nothing is left behind that keeps others away


def test_a_request_larger_than_a_batch_is_run_alone() -> None:
    held = Held()
    held.gate.set()
    assert Together(held, max_rows=2)(5, rows=10).unwrap() == 10


def test_more_than_may_wait_are_refused_and_who_waits_too_long_gives_up() -> None:
    held = Held()
    together = Together(held, max_waiting=1)
    found: dict[int, Outcome[int]] = {}
    first = threading.Thread(target=ask, args=(together, 0, found))
    first.start()
    assert held.begun.acquire(timeout=WAIT)
    [second] = callers(together, [1], found)
    refused = together(2)
    assert refused.error is not None and refused.error.code == OVERLOADED
    held.gate.set()
    first.join(WAIT)
    second.join(WAIT)
    held.gate.clear()
    first = threading.Thread(target=ask, args=(together, 3, found))
    first.start()
    assert held.begun.acquire(timeout=WAIT) and held.begun.acquire(timeout=WAIT)
    late = together(4, deadline=time.monotonic() + 0.01)
    assert late.error is not None and late.error.code == TIMED_OUT
    held.gate.set()
    first.join(WAIT)
    assert found[3].unwrap() == 6
    assert [4] not in held.batches  # nobody computes what nobody waits for


def test_two_batches_run_at_once_where_they_may() -> None:
    held = Held()
    together = Together(held, at_once=2)
    found: dict[int, Outcome[int]] = {}
    threads = [threading.Thread(target=ask, args=(together, n, found)) for n in range(2)]
    for thread in threads:
        thread.start()
    assert held.begun.acquire(timeout=WAIT) and held.begun.acquire(timeout=WAIT)
    held.gate.set()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(held.batches) == [[0], [1]]


def test_a_caller_who_is_interrupted_leaves_the_others_an_answer() -> None:
    begun = threading.Event()
    gate = threading.Event()

    def run(numbers: Sequence[int]) -> list[Outcome[int]]:
        if 0 in numbers:
            begun.set()
            assert gate.wait(WAIT)
            raise KeyboardInterrupt
        return [Outcome(number) for number in numbers]

    together = Together(run, max_rows=8)
    found: dict[int, Outcome[int]] = {}

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            together(0)

    first = threading.Thread(target=interrupted)
    first.start()
    assert begun.wait(WAIT)
    rest = callers(together, [1, 2], found)
    gate.set()
    for thread in (first, *rest):
        thread.join(WAIT)
    assert {number: one.unwrap() for number, one in found.items()} == {1: 1, 2: 2}


def test_nobody_waits_for_a_batch_that_takes_long() -> None:
    held = Held()
    together = Together(held, patience=0.02)
    found: dict[int, Outcome[int]] = {}
    threads = [threading.Thread(target=ask, args=(together, n, found)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert held.begun.acquire(timeout=WAIT)  # each runs beside the others, which never end
    held.gate.set()
    for thread in threads:
        thread.join(WAIT)
    assert {number: one.unwrap() for number, one in found.items()} == {0: 0, 1: 2, 2: 4}
    held.batches.clear()
    assert together(5).unwrap() == 10  # and later one batch at a time again
    assert together._running == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 8))
def test_everybody_gets_an_answer_of_their_own(rows: list[int], max_rows: int) -> None:
    sizes: list[int] = []

    def run(numbers: Sequence[tuple[int, int]]) -> list[Outcome[int]]:
        sizes.append(sum(size for _, size in numbers) if len(numbers) > 1 else 0)
        return [Outcome(number) for number, _ in numbers]

    together = Together(run, max_rows=max_rows)
    found: dict[int, int] = {}

    def one(number: int, size: int) -> None:
        found[number] = together((number, size), size).unwrap()

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert found == {number: number for number in range(len(rows))}
    assert max(sizes) <= max_rows
