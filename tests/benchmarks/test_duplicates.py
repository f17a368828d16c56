"""Precision and recall of pairs, against a count by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from radapter_serve.index.duplicates import Group


def test_precision_and_recall_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("duplicates")
    groups = [
        Group(["cropped/1.png", "original/1.png", "recompressed/1.jpg"], [1, 1, 1]),
        Group(["original/2.png", "original/3.png", "resized/2.png"], [1, 1, 1]),
    ]
    # Six pairs, of which 3 + 1 are of one drawing; three drawings have six pairs each.
    assert script.precision_and_recall(groups, 3) == (4 / 6, 4 / 18)
    assert script.precision_and_recall([], 3) == (1.0, 0.0)
