"""What is exchanged, and the precision of a list, against counts by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from radapter_serve.evaluation.doubtful import Doubtful


def test_a_share_is_exchanged_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("wrong_labels")
    labels = ["a", "b", "c", "d"] * 10
    found = script.exchanged(labels, ["a", "b", "c", "d", "e"], 0.1, seed=3)
    wrong = {number for number in range(40) if found[number] != labels[number]}
    assert len(wrong) == 4 and set(found) <= set("abcde")
    assert found == script.exchanged(labels, ["a", "b", "c", "d", "e"], 0.1, seed=3)
    listed = [Doubtful("x.png", "a", "b", "c", 0.1, 0.2, number) for number in (*wrong, *range(40))]
    assert script.precision(listed, wrong, 4) == 100
    assert script.precision(listed, wrong, 8) == 50 + 100 * len(wrong & {0, 1, 2, 3}) / 8
