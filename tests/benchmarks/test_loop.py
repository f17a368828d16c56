"""Closed and open loops, against servers that a test makes as slow or as broken as it needs."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from benchmarks.loop import TOO_MANY, Closed, Measured, Open, measure
from radapter_client import InvalidRequest, ServerUnavailable


class Server:
    """Answers after `seconds`, one request after the other where it is `serial`."""

    def __init__(self, seconds: float, *, serial: bool = False) -> None:
        self.seconds = seconds
        self.lock = asyncio.Semaphore(1 if serial else 10**6)
        self.now = self.most = 0
        self.numbers: list[int] = []

    async def __call__(self, number: int) -> None:
        self.numbers.append(number)
        self.now += 1
        self.most = max(self.most, self.now)
        async with self.lock:
            await asyncio.sleep(self.seconds)
        self.now -= 1


@pytest.mark.parametrize("callers", [1, 5])
def test_a_closed_loop_keeps_as_many_requests_under_way_as_it_has_callers(callers: int):
    server = Server(0.02)
    measured = asyncio.run(measure(server, Closed(callers), 0.3))
    assert server.most == callers
    assert server.numbers == list(range(len(server.numbers)))
    assert len(measured.latencies) == len(server.numbers) > callers
    assert min(measured.latencies) >= 0.02
    assert measured.throughput == pytest.approx(len(server.numbers) / measured.seconds)


def test_an_open_loop_does_not_wait_for_answers():
    server = Server(0.2)
    measured = asyncio.run(measure(server, Open(rate=100), 0.5))
    due = np.cumsum(np.random.default_rng(0).exponential(1 / 100, 200))
    assert len(server.numbers) == np.count_nonzero(due < 0.5)
    assert server.most > 5
    assert len(measured.latencies) == len(server.numbers)  # it waits for the last ones


def test_latency_in_an_open_loop_counts_from_when_the_request_was_due():
    measured = asyncio.run(measure(Server(0.03, serial=True), Open(rate=100), 0.6))
    # Three times as many as it can answer: the last ones wait for twice the time of the run. Each
    # took 0.03 s.
    assert max(measured.latencies) > 0.6
    half = len(measured.latencies) // 2
    assert np.mean(measured.latencies[half:]) > 2 * np.mean(measured.latencies[:half])


def test_an_open_loop_has_a_bound_on_what_is_under_way():
    server = Server(0.3)
    measured = asyncio.run(measure(server, Open(rate=200, at_most=7), 0.25))
    assert server.most == 7
    assert measured.errors[TOO_MANY] > 0
    assert len(measured.latencies) == len(server.numbers)


def test_errors_are_counted_by_kind_and_are_no_latencies():
    async def send(number: int) -> None:
        if number % 3 == 1:
            raise InvalidRequest("no", code="invalid_argument")
        if number % 3 == 2:
            raise ServerUnavailable("gone")
        await asyncio.sleep(0.001)

    measured = asyncio.run(measure(send, Closed(1), 0.2))
    assert set(measured.errors) == {"InvalidRequest [invalid_argument]", "ServerUnavailable"}
    total = len(measured.latencies) + sum(measured.errors.values())
    assert 0 <= len(measured.latencies) - total / 3 <= 1


def test_other_exceptions_are_not_swallowed():
    async def send(number: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(measure(send, Closed(2), 0.1))


def test_percentiles_by_hand():
    measured = Measured([value / 1000 for value in range(101)], seconds=2.0)
    assert measured.percentiles(50, 90, 99) == pytest.approx([0.050, 0.090, 0.099])
    assert measured.throughput == 50.5
    assert np.isnan(Measured().percentiles(50)).all()
    assert Measured().throughput == 0


def test_seconds_reach_to_the_last_answer():
    start = time.perf_counter()
    measured = asyncio.run(measure(Server(0.2), Closed(1), 0.05))
    assert 0.2 <= measured.seconds <= time.perf_counter() - start
