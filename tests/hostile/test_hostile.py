"""Hostile requests keep the promises of `docs/gateway.md`: each is refused with a code, or answered
right, while another client gets the same bytes as before.

By `HOSTILE_SEED` and `HOSTILE_REQUESTS` other requests, and more.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_upstream import until
from tests.hostile.cases import BROKEN, CHECKED, REFUSED, Case, by_hand, case, of_kind
from tests.hostile.harness import Answer, Good, Outcome, attack, memory, open_files, trouble, world

SEED = int(os.environ.get("HOSTILE_SEED", "1"))
REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "50000"))


def keep_promises(folder: Path, engine: str, count: int) -> None:
    """Send so many hostile requests to a world in an empty folder."""
    with world(folder, engine) as running:
        before = running.processes()
        with Good(running.address) as good:
            report = attack(running.address, SEED, range(count))
        if running.server is not None:
            running.server.check()  # says what died, and why
        assert not report.failures, "\n".join(report.failures[:20])
        assert good.troubles == [] and good.asked >= 10
        assert running.processes() == before
    assert running.process.returncode == 0


@pytest.mark.triton
def test_hostile_requests(tmp_path: Path) -> None:
    keep_promises(tmp_path, "triton", 2_000)


@pytest.mark.triton
@pytest.mark.slow
def test_many_hostile_requests(tmp_path: Path) -> None:
    keep_promises(tmp_path, "triton", REQUESTS)


@pytest.mark.slow
def test_hostile_requests_to_an_engine(tmp_path: Path) -> None:
    keep_promises(tmp_path, "process", 2_000)


@pytest.mark.slow
def test_refused_bodies_of_many_callers(tmp_path: Path) -> None:
    """Their bodies are thrown away, and neither connections nor memory stay."""
    numbers = of_kind("refused body")
    with world(tmp_path, "process") as running:
        pid = running.process.pid
        attack(running.address, SEED, numbers)  # what loads first
        files = open_files(pid)
        before = memory(pid)
        with Good(running.address) as good:
            report = attack(running.address, SEED, numbers * 20, workers=100)
        assert not report.failures, "\n".join(report.failures[:20])
        assert good.troubles == [] and good.asked >= 10
        until(lambda: open_files(pid) <= files, 20)
        assert memory(pid) - before < 48


def test_a_number_is_always_the_same_request() -> None:
    numbers = range(len(by_hand()), len(by_hand()) + 60)
    first = [case(1, number) for number in numbers]
    assert first == [case(1, number) for number in numbers]
    assert len({one.data for one in first}) > 50
    assert first != [case(2, number) for number in numbers]


def answer(status: int, content: Any, **headers: str) -> Answer:
    head = {"content-type": "application/json", **headers}
    return Answer(status, head, json.dumps(content).encode())


def refusal(text: str, status: int = 400, **headers: str) -> Answer:
    return answer(status, {"error": text}, **headers)


def answered(name: str, shape: list[int], *data: float) -> Answer:
    output = {"name": name, "datatype": "FP32", "shape": shape, "data": data}
    return answer(200, {"model_version": "1", "outputs": [output]})


NO_REQUEST = refusal("[invalid_argument] no request of HTTP/1.1", connection="close")


@pytest.mark.parametrize(
    ("promise", "answers", "why"),
    [
        (REFUSED, [refusal("[invalid_argument] the input text is missing")], None),
        (REFUSED, [refusal("[made_up] the input text is missing")], "without a code"),
        (REFUSED, [refusal("[invalid_argument] line 3 of app.py")], "says too much"),
        (REFUSED, [refusal("[internal_error] failed", 500)], "status 500"),
        (REFUSED, [answer(400, "<html>")], "without JSON"),
        (REFUSED, [], "closed without an answer"),
        (BROKEN, [], None),
        (REFUSED, [answered("score", [1], 0.5)], "as if it were right"),
        (CHECKED, [answered("score", [1], 0.5)], None),
        (CHECKED, [answered("score", [1], 7)], "a score that is none"),
        (CHECKED, [answered("score", [2], 0.5)], "cannot be read"),
        (CHECKED, [answered("text_embeds", [1, 1], 2)], "unit length"),
        (BROKEN, [refusal("[no_labels] x"), NO_REQUEST], None),
        (CHECKED, [refusal("[no_labels] x"), NO_REQUEST], "more than was asked"),
    ],
)
def test_the_judge(promise: str, answers: list[Answer], why: str | None) -> None:
    outcome = Outcome(answers, how="answered" if answers else "closed")
    verdict = trouble(Case("x", b"", promise), outcome)
    assert (verdict is None) == (why is None) and (why or "") in (verdict or "")
