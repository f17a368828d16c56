"""Whether a gateway that runs also answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from radapter_serve.gateway.liveness import (
    INTERVAL_SECONDS,
    MAX_SILENCE_SECONDS,
    MAX_START_SECONDS,
    Liveness,
    asks,
)
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_upstream import serving


def watched(ask: Callable[[], bool]) -> tuple[Liveness, FakeClock]:
    clock = FakeClock()
    return Liveness(ask, clock), clock


def settled(watch: Liveness) -> bool:
    """What it says once the present question has its answer."""
    while watch._asked is not None and not watch._asked.done():
        time.sleep(0.001)
    return watch.silent()


def test_it_is_silent_once_it_has_not_answered_for_so_long() -> None:
    answers = [True]
    watch, clock = watched(lambda: answers[0])
    clock.now += INTERVAL_SECONDS
    assert not watch.silent() and not settled(watch)  # asked, and answered
    answered = clock.now
    answers[0] = False
    while clock.now + INTERVAL_SECONDS < answered + MAX_SILENCE_SECONDS:
        clock.now += INTERVAL_SECONDS
        assert not watch.silent() and not settled(watch)
    clock.now = answered + MAX_SILENCE_SECONDS - 0.01
    assert not settled(watch)
    clock.now = answered + MAX_SILENCE_SECONDS
    assert watch.silent()
    watch.close()


def test_it_has_longer_to_start_and_again_after_a_restart() -> None:
    watch, clock = watched(lambda: False)
    clock.now += MAX_START_SECONDS - 0.01
    assert not watch.silent()
    clock.now += 0.01
    assert settled(watch)
    watch.restart()
    assert not watch.silent()
    clock.now += MAX_START_SECONDS - 0.01
    assert not watch.silent()
    watch.close()


def test_a_question_without_an_answer_holds_up_nobody() -> None:
    go = threading.Event()
    asked: list[float] = []

    def ask() -> bool:
        asked.append(clock.now)
        return go.wait(10)

    watch, clock = watched(ask)
    for _ in range(5):
        clock.now += INTERVAL_SECONDS
        assert not watch.silent()
    while not asked:
        time.sleep(0.001)
    assert len(asked) == 1  # one question at a time
    clock.now += MAX_START_SECONDS
    assert watch.silent()
    go.set()
    watch.close()


def test_asking_a_gateway() -> None:
    with serving() as served:
        ask = asks("127.0.0.1", served.port, tls=False)
        assert ask()
        assert not asks("127.0.0.1", served.port, tls=True)()
    assert not ask()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert not asks("127.0.0.1", mute.getsockname()[1], tls=False, timeout=0.2)()
