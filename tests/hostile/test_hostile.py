"""Hostile requests keep the promises of `docs/gateway.md`: each is refused with a code, or answered
right, while another client gets the same bytes as before.

By `HOSTILE_SEED` and `HOSTILE_REQUESTS` other requests, and more; by `HOSTILE_NUMBER` one alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.fake_upstream import until
from tests.hostile.cases import BROKEN, CHECKED, REFUSED, Case, case, refused_bodies
from tests.hostile.harness import Answer, Good, Outcome, attack, memory, open_files, trouble, world

SEED = int(os.environ.get("HOSTILE_SEED", "1"))


def numbers(count: int) -> Iterable[int]:
    if one := os.environ.get("HOSTILE_NUMBER"):
        return [int(one)]
    return range(int(os.environ.get("HOSTILE_REQUESTS", count)))


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        pytest.param("triton", 2_000, marks=pytest.mark.triton, id="triton"),
        pytest.param(
            "triton", 50_000, marks=[pytest.mark.triton, pytest.mark.slow], id="many-to-triton"
        ),
        pytest.param("process", 2_000, marks=pytest.mark.slow, id="to_an_engine"),
    ],
)
def test_hostile_requests(engine: str, count: int, tmp_path: Path) -> None:
    cases = {f"HOSTILE_SEED={SEED} HOSTILE_NUMBER={n}": case(SEED, n) for n in numbers(count)}
    with world(tmp_path, engine) as running:
        before = running.processes()
        with Good(running.address):
            attack(running.address, cases)
        if running.server is not None:
            running.server.check()  # says what died, and why
        assert running.processes() == before
    assert running.process.returncode == 0


@pytest.mark.slow
def test_refused_bodies_of_many_callers(tmp_path: Path) -> None:
    """Their bodies are thrown away, and neither connections nor memory stay."""
    cases = {str(number): hostile for number, hostile in enumerate([*refused_bodies()] * 20)}
    with world(tmp_path, "process") as running:
        pid = running.process.pid
        attack(running.address, dict([*cases.items()][: len(cases) // 20]))  # what loads first
        files = open_files(pid)
        before = memory(pid)
        with Good(running.address):
            attack(running.address, cases, workers=100)
        until(lambda: open_files(pid) <= files, 20)
        assert memory(pid) - before < 48


def refusal(text: str, status: int = 400, **headers: str) -> Answer:
    return Answer(status, headers, json.dumps({"error": text}).encode())


def answered(name: str, *data: float) -> Answer:
    output = {"name": name, "datatype": "FP32", "shape": [1], "data": data}
    content = {"model_version": "1", "outputs": [output]}
    return Answer(200, {}, json.dumps(content).encode())


NO_REQUEST = refusal("[invalid_argument] no request of HTTP/1.1", connection="close")


@pytest.mark.parametrize(
    ("promise", "answers", "why"),
    [
        (REFUSED, [refusal("[no_labels] there are none")], None),
        (REFUSED, [refusal("[made_up] x")], "without a code"),
        (REFUSED, [refusal("[invalid_argument] line 3 of app.py")], "says too much"),
        (REFUSED, [refusal("[internal_error] failed", 500)], "status 500"),
        (REFUSED, [Answer(400, {}, b"<html>")], "without JSON"),
        (REFUSED, [], "closed without an answer"),
        (BROKEN, [], None),
        (REFUSED, [answered("score", 0.5)], "as if it were right"),
        (CHECKED, [answered("score", 0.5)], None),
        (CHECKED, [answered("score", 7)], "a score that is none"),
        (CHECKED, [answered("score")], "cannot be read"),
        (CHECKED, [answered("text_embeds", 2)], "unit length"),
        (BROKEN, [refusal("[no_labels] x"), NO_REQUEST], None),
        (CHECKED, [refusal("[no_labels] x"), NO_REQUEST], "more than was asked"),
    ],
)
def test_the_judge(promise: str, answers: list[Answer], why: str | None) -> None:
    outcome = Outcome(answers, how="answered" if answers else "closed")
    verdict = trouble(Case("x", b"", promise), outcome)
    assert (verdict is None) == (why is None) and (why or "") in (verdict or "")
