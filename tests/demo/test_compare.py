"""The demo's comparison: its full fine-tuning is the rivals', its figures are `radapter-eval`'s."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radapter_serve.demo import data
from radapter_serve.demo.compare import (
    OURS,
    RIVAL,
    Ends,
    Line,
    accuracies,
    compared,
    gains,
    right,
    wise_ft,
)
from radapter_serve.demo.full import fine_tune
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.rows import Results, Row
from radapter_serve.evaluation.run import evaluate_suite, open_set
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.training import Recipe, train
from rivals.cells import judge
from rivals.full import FullFineTuning
from rivals.method import Run, learned

FIELDS: dict[str, Any] = {
    "architecture": f"local-dir:{data.BASE}",
    "batch_size": 8,
    "steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
    "flip": True,
    "workers": 0,
    "tracker": "none",
    "save_every": None,
}


@pytest.fixture(scope="module")
def given(some: data.DemoData) -> dict[str, Any]:
    """A recipe of two steps that change much."""
    return {
        **FIELDS,
        "data": f"imagefolder:{some.train}",
        "classes": some.classes,
        "templates": str(some.templates),
    }


@pytest.fixture(scope="module")
def rival(given: dict[str, Any]) -> Ends:
    """The demo's full fine-tuning."""
    return fine_tune(Recipe(**given))


@pytest.fixture(scope="module")
def run(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R-Adapter of the same recipe."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(Recipe(**given, momentum=0.0, out=out)).folder


def assert_equal(line: Line, rows: list[Row]) -> None:
    expected = {(row.dataset, row.alpha): 100 * row.metrics["acc1"] for row in rows}
    figures = {
        (style, at): of[0] for style, _, values in accuracies(line) for at, of in values.items()
    }
    assert figures == pytest.approx(expected)
    assert len(set(figures.values())) > 1  # else it would show nothing


@pytest.mark.slow
def test_full_fine_tuning_is_that_of_the_rivals(
    given: dict[str, Any], rival: Ends, tmp_path: Path
) -> None:
    theirs = learned(FullFineTuning({"weight_decay": 0.0}), Run(given, tmp_path)).end
    ours = {f"model.{name}": value for name, value in rival.end.items()}
    head = torch.from_numpy(rival.last)
    ours |= {"head.weight": head[:, :-1], "head.bias": head[:, -1]}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
    changed = {
        name for name, value in rival.end.items() if not torch.equal(value, rival.start[name])
    }
    assert changed and all(name.startswith("visual.") for name in changed)


@pytest.mark.slow
def test_both_are_right_as_often_as_other_judges_say(
    given: dict[str, Any], run: Path, rival: Ends, some: data.DemoData, tmp_path: Path
) -> None:
    test = {style: some.test[style] for style in (data.FINE_TUNED, "filled")}
    two_styles = dataclasses.replace(some, test=test)
    ours = right(from_adapter(run, (0.0, 0.3, 1.0)), two_styles)
    theirs = right(wise_ft(rival, (0.0, 0.5, 1.0)), two_styles)
    # The same test sets as `radapter-eval` takes them.
    more: dict[str, Any] = {"classes": str(some.classes), "templates": str(some.templates)}
    entries = [Entry(f"imagefolder:{of}", name=style, **more) for style, of in test.items()]
    suite = Suite("styles", tuple(entries))
    rows = evaluate_suite(from_adapter(run, (0.0, 0.3, 1.0)), suite, Results(tmp_path))
    assert_equal(ours, rows)
    method = FullFineTuning({"weight_decay": 0.0})
    source = Run(given, tmp_path).of(method.settings)
    sets = [open_set(suite, entry) for entry in suite.entries]
    assert_equal(theirs, judge(learned(method, source), source, sets, (0.0, 0.5, 1.0)))


def test_leads_are_paired_and_have_intervals() -> None:
    def hits(*right: int) -> dict[str, Any]:
        return {
            style: np.arange(100) < count
            for style, count in zip((data.FINE_TUNED, "line", "pixel"), right, strict=True)
        }

    line = {0.0: hits(50, 40, 42), 0.5: hits(60, 45, 41), 1.0: hits(70, 30, 30)}
    rival = {**line, 1.0: hits(20, 10, 12)}
    zero, ours, whole, full, wise = compared({OURS: line, RIVAL: rival}, 0.5)
    assert [row["system"] for row in (ours, full)] == ["R-Adapter, α = 0.5", "full fine-tuning"]
    assert (ours["shifts"]["accuracy"], ours["shifts"]["lead"], ours["shifts"]["n"]) == (43, 0, 200)
    assert (zero["shifts"]["lead"], whole["in_distribution"]["lead"]) == pytest.approx((2, -10))
    assert (full["shifts"]["lead"], wise["shifts"]["lead"]) == pytest.approx((32, 0))
    interval = pytest.approx(196 * np.sqrt(0.1 * 0.9 / 99), rel=1e-3)
    assert zero["in_distribution"]["interval"] == interval
    own, other, more, mean = gains(line[0.0], line[0.5])
    assert own["interval"] == interval
    assert [row["gain"] for row in (own, other, more, mean)] == pytest.approx([10, 5, -1, 2])
    assert (mean["before"], mean["after"], mean["n"]) == pytest.approx((41, 43, 200))
