"""The scenes as benchmarks: both open, with sets that choose and sets that judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from radapter_serve.training import Recipe
from radapter_serve.training.tasks import open_run
from rivals import scenes
from rivals.benchmark import load_benchmark
from rivals.method import Run


@pytest.mark.slow
def test_both_benchmarks_of_scenes_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "TRAIN", 3)
    monkeypatch.setattr(scenes, "TEST", 2)
    assert scenes.main([str(tmp_path)]) == 0
    for task in ("retrieval", "segmentation"):
        benchmark = load_benchmark(tmp_path / f"{task}.yaml")
        recipe = Recipe(**{**benchmark.fields, "batch_size": 2})
        run = Run({**benchmark.fields, "batch_size": 2}, tmp_path / "learned")
        data, _ = open_run(recipe, images=False).ready(recipe, run.base)
        assert len(data.rows) >= 3
        chosen, judged = (benchmark.sets(split) for split in ("validation", "test"))
        assert [data.entry.name for data in chosen] == ["scenes, validation"]
        names = ["scenes, colour", "scenes, filled", "scenes, emoji-noto"]
        assert [data.entry.name for data in judged] == names
    images = {path.read_bytes() for path in tmp_path.glob("*/images/*.png")}
    assert len(images) == 3 + 2 + 3 * 2  # no scene twice
