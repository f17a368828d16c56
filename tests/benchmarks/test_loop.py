"""Closed and open loops against servers as slow as a test needs, and the stages of a request."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.loop import Closed, Open, Stages, measure


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
    server = Server(0.01)
    measured = asyncio.run(measure(server, Closed(callers), 0.3))
    assert server.most == callers
    assert server.numbers == list(range(len(server.numbers)))
    assert len(measured.latencies) == len(server.numbers) > callers
    assert min(measured.latencies) >= 0.01
    assert measured.throughput == pytest.approx(len(server.numbers) / measured.seconds)


def test_an_open_loop_waits_for_no_answer_and_counts_from_when_a_request_was_due():
    """Three times as many as the server can answer: the last wait for twice the time of the run."""
    server = Server(0.01, serial=True)
    measured = asyncio.run(measure(server, Open(rate=300), 0.2))
    due = np.cumsum(np.random.default_rng(0).exponential(1 / 300, 200))
    assert len(server.numbers) == np.count_nonzero(due < 0.2)
    assert server.most > 5
    assert len(measured.latencies) == len(server.numbers)  # it waits for the last ones
    assert max(measured.latencies) > 0.2
    half = len(measured.latencies) // 2
    assert np.mean(measured.latencies[half:]) - np.mean(measured.latencies[:half]) > 0.1


def test_where_the_time_goes_by_hand():
    """8 requests of classify in 2 batches of 30 ms each; its encoder takes 20 and waits for 4."""

    def counts(count: int, executions: int, queue: float, compute: float) -> dict[str, float]:
        times = {"queue": queue * 1e6, "compute": compute * 1e6}
        return {"count": count, "executions": executions, **times}

    others = counts(1, 1, 1, 1)
    before = {
        "classify": counts(10, 10, 5, 7),
        "image_encoder": counts(10, 10, 1, 1),
        "embed_text": others,
    }
    after = {
        "classify": counts(18, 12, 5 + 8 * 3, 7 + 8 * 30),
        "image_encoder": counts(12, 12, 1 + 2 * 4, 1 + 2 * 20),
        "embed_text": others,
    }
    stages = Stages.between("classify", before, after, seconds=8 * 0.040, requests=8)
    assert (stages.queue, stages.task, stages.encoder) == pytest.approx((3 + 4, 6, 20))
    assert stages.network == pytest.approx(40 - 3 - 30)
