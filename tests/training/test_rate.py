"""`learning_rate: auto`: the rule by hand, short runs against runs of the same length, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from radapter_serve import RAdapterError, evaluate, load_adapter, train
from radapter_serve.training import Recipe
from radapter_serve.training.start import GRID, START, ShortRun, most_conservative, next_rate
from tests.helpers.by_hand import steps_taken
from tests.helpers.short_run import short_run


def trial(rate: float, right: int, first: int = 0, kept: float = 0.5) -> ShortRun:
    """A short run that is right on `right` of 100 images, from the `first` on."""
    number = np.arange(100)
    return ShortRun(rate, (number >= first) & (number < first + right), kept)


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        # 1 of 100 paired images differs: 0.01 against √(0.01·0.99/100) = 0.00995, just outside
        ([trial(5e-4, 59, kept=0.52), trial(1.5e-3, 60), trial(5e-3, 58, kept=1)], 1.5e-3),
        # 45 against 40 that are others: 0.05 against √(0.85 − 0.0025)/10 = 0.092
        ([trial(5e-4, 40, first=60, kept=0.51), trial(1.5e-2, 45)], 5e-4),
        ([trial(5e-4, 40, first=60, kept=0.49), trial(1.5e-2, 45)], 1.5e-2),
        # of equals in both the more accurate, the nearest to the paper's, the lower
        ([trial(5e-4, 40, first=60), trial(1.5e-2, 45)], 1.5e-2),
        ([trial(rate, 60) for rate in GRID], 5e-4),
        ([trial(rate, 60) for rate in GRID if rate != 5e-4], 1.5e-4),
        # not below the paper's, where little is learned and all is kept, unless the best is
        ([*(trial(r, 40, 60, 1 - r) for r in (1.5e-4, 5e-4)), trial(1.5e-3, 45, kept=0.95)], 5e-4),
        ([trial(5e-5, 40, first=60, kept=0.9), trial(1.5e-4, 45), trial(5e-4, 9)], 1.5e-4),
        # none that keeps less than nine tenths of what the paper's keeps, however accurate it is
        ([trial(5e-4, 40, kept=0.8), trial(1.5e-3, 50, kept=0.73), trial(5e-3, 90)], 1.5e-3),
        ([trial(5e-4, 40, kept=0.8), trial(1.5e-3, 50, kept=0.71), trial(5e-3, 90)], 5e-4),
    ],
)
def test_takes_what_keeps_most_within_one_standard_error_of_the_best(
    runs: list[ShortRun], chosen: float
) -> None:
    assert (
        most_conservative(runs).learning_rate
        == most_conservative(runs[::-1]).learning_rate
        == chosen
    )


def test_the_grid_grows_to_the_side_where_the_best_is() -> None:
    def best_at(best: float) -> list[ShortRun]:
        return [trial(rate, 60 if rate == best else 50) for rate in START]

    assert next_rate(best_at(5e-4)) is None
    assert next_rate(best_at(1.5e-4)) == 5e-5
    assert next_rate(best_at(1.5e-3)) == 5e-3
    assert next_rate([*best_at(5e-3), trial(5e-3, 60)]) == 1.5e-2
    assert next_rate([trial(5e-2, 60), trial(1.5e-2, 50)]) is None
    assert next_rate([trial(rate, 60) for rate in START]) is None  # nothing tells where to go
    assert next_rate([trial(rate, 60, kept=1 - 9 * rate) for rate in START]) is None
    # The best, at the upper edge, keeps too little.
    assert next_rate([*best_at(5e-4)[:2], trial(1.5e-3, 70, kept=0.4)]) is None


@pytest.fixture
def recipe(tiny_clip_dir: str, images: Path, tmp_path: Path) -> Recipe:
    """24 images to learn from and to choose by."""
    data = f"imagefolder:{images}"
    fields: dict[str, Any] = {"templates": "simple", "alpha": 0.6, "preserve": 1.0}
    return short_run(
        tiny_clip_dir, tmp_path, data=data, val_data=data, learning_rate="auto", **fields
    )


@pytest.mark.slow
def test_a_run_finds_its_rate_by_short_runs(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe)
    assert capsys.readouterr().out == ""
    table = json.loads((run.folder / "rates.json").read_text())
    stored_recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    stored = load_adapter(run).metadata.recipe
    for rate in (run.recipe.learning_rate, stored_recipe["learning_rate"], stored["learning_rate"]):
        assert rate == table["chosen"]
    rates = [row["learning_rate"] for row in table["tried"]]
    assert set(START) <= set(rates) and rates == sorted(rates) and len(rates) <= 4

    # Each short run is a run of two steps.
    length: dict[str, Any] = {"steps": 2, "warmup_steps": 0, "momentum": 0.0}
    for number, row in enumerate(table["tried"]):
        rate = row["learning_rate"]
        out = tmp_path / f"{number}"
        short = train(dataclasses.replace(recipe, learning_rate=rate, out=out, **length))
        assert row["accuracy"] == pytest.approx(100 * short.metrics["acc1@alpha=0.6"], abs=0.01)
        rows = evaluate(short, [0.0, 0.6], data=recipe.data, out=tmp_path / f"r{number}").rows
        share = next(result.metrics["kept"] for result in rows if result.alpha == 0.6)
        assert row["images"] == 24 and row["base_answers_kept"] == pytest.approx(100 * share, 0.01)
    same = dataclasses.replace(recipe, learning_rate=table["chosen"], out=tmp_path / "same")
    assert load_adapter(train(same)).digest == load_adapter(run).digest


def test_a_search_warns_where_the_best_is_at_the_edge_and_is_kept_by_a_resumed_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Search among one rate.
    monkeypatch.setattr("radapter_serve.training.start.START", GRID[3:4])
    monkeypatch.setattr("radapter_serve.training.start.next_rate", lambda trials: None)
    monkeypatch.setattr("radapter_serve.training.start.SHARE", 2)
    # A least rate above all that the search may choose.
    recipe = dataclasses.replace(recipe, steps=4, save_every=1, min_learning_rate=1.0)
    with steps_taken() as steps:
        run = train(recipe, progress=True)
    assert run.recipe.min_learning_rate == run.recipe.learning_rate == GRID[3]
    assert max(step.rate for step in steps) == GRID[3]
    printed = capsys.readouterr().out
    assert printed.count("held-out images right at alpha 0.6") == 1
    [note] = json.loads((run.folder / "rates.json").read_text())["notes"]
    assert "at the edge of what was tried" in note and note in run.notes and note in printed

    run.adapter.unlink()
    searched = (run.folder / "rates.json").stat().st_mtime_ns
    resumed_run = train(recipe, resume=True)
    assert resumed_run.recipe.learning_rate == GRID[3] and resumed_run.adapter.is_file()
    assert (run.folder / "rates.json").stat().st_mtime_ns == searched


def test_refuses_to_search_in_several_processes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RAdapterError, match="searches in one process"):
        train(recipe)
    assert recipe.out is not None and not recipe.out.exists()
