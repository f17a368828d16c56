"""Hostile requests keep the promises of `docs/gateway.md`: each is refused with a code, or answered
right, while another client gets the same bytes as before.

By `HOSTILE_SEED` and `HOSTILE_REQUESTS` other requests, and more; by `HOSTILE_NUMBER` one alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests.helpers.fake_upstream import until
from tests.hostile.cases import BROKEN, CHECKED, REFUSED, Case, case, refused_bodies
from tests.hostile.harness import Answer, Good, Outcome, attack, memory, trouble, world

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
        process = psutil.Process(running.process.pid)
        attack(running.address, dict([*cases.items()][: len(cases) // 20]))  # what loads first
        files = process.num_fds()
        before = memory(process.pid)
        with Good(running.address):
            attack(running.address, cases, workers=100)
        until(lambda: process.num_fds() <= files, 20)
        assert memory(process.pid) - before < 48


def answer(status: int, content: object) -> Answer:
    return Answer(status, {}, json.dumps(content).encode())


def answered(name: str, value: float) -> Answer:
    output = {"name": name, "datatype": "FP32", "shape": [1], "data": [value]}
    return answer(200, {"model_version": "1", "outputs": [output]})


NO_LABELS = answer(400, {"error": "[no_labels] there are none"})


@pytest.mark.parametrize(
    ("promise", "answers", "why"),
    [
        (REFUSED, [NO_LABELS], None),
        (REFUSED, [answer(400, {"error": "[made_up] x"})], "without a code"),
        (REFUSED, [answer(400, {"error": "[no_labels] line 3 of app.py"})], "says too much"),
        (REFUSED, [answer(500, {"error": "[internal_error] failed"})], "status 500"),
        (REFUSED, [], "closed without a whole answer"),
        (REFUSED, [answered("score", 0.5)], "as if it were right"),
        (CHECKED, [answered("score", 0.5)], None),
        (CHECKED, [answered("score", 7)], "a score that is none"),
        (CHECKED, [answered("text_embeds", 2)], "unit length"),
        (BROKEN, [], None),
        (BROKEN, [NO_LABELS, NO_LABELS], "more than was asked"),
    ],
)
def test_the_judge(promise: str, answers: list[Answer], why: str | None) -> None:
    verdict = trouble(Case("x", b"", promise), Outcome(answers, how="closed"))
    assert (verdict is None) == (why is None) and (why or "") in (verdict or "")
