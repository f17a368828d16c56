"""A run of a few steps of a tiny CLIP on coloured images, for any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.run import open_set
from radapter_serve.evaluation.suite import Entry, Suite
from rivals import cells as cells_module
from rivals.benchmark import write_benchmark
from rivals.method import Run, learned
from rivals.others import Collection
from tests.training.conftest import coloured as coloured
from tests.training.conftest import images as images


@pytest.fixture
def make_run(images: Path, tiny_clip_dir: str, tmp_path: Path) -> Callable[..., Run]:
    """Two steps of four images; other fields of the recipe have the last word."""

    def make(**fields: Any) -> Run:
        few: dict[str, Any] = {
            "architecture": tiny_clip_dir,
            "data": f"imagefolder:{images}",
            "templates": "simple",
            "batch_size": 4,
            "steps": 2,
            "warmup_steps": 0,
            "workers": 0,
        }
        return Run({**few, **fields}, tmp_path / "learned")

    return make


@pytest.fixture
def sets(images: Path) -> list[EvaluationSet]:
    """The images that the run learns from, as a set to judge by."""
    entry = Entry(f"imagefolder:{images}", name="same", templates="simple")
    return [open_set(Suite("colours", (entry,)), entry)]


def collection_of(
    images: Path, styles: Sequence[str], start: int, fields: Mapping[str, Any]
) -> Collection:
    """Coloured images, `start` of each class for training; an interval needs two other classes."""
    by_class = {place.name: sorted(place.iterdir()) for place in sorted(images.iterdir())}
    by_class["fourth"] = by_class["red"]
    train = {name: paths[:start] for name, paths in by_class.items()}
    test = {name: paths[start:] for name, paths in by_class.items()}
    tests = dict.fromkeys(styles, test)
    return Collection(tuple(by_class), ("a {}",), train, tests, fields)


@pytest.fixture
def benchmark_file(images: Path, tiny_clip_dir: str, tmp_path: Path) -> Path:
    """Coloured images, one set of them each to choose by, in distribution and shifted."""
    sets: list[dict[str, Any]] = [
        {"name": "chosen by", "data": "imagefolder:images", "split": "validation"},
        {"name": "same", "data": "imagefolder:images", "shift": "id"},
        {"name": "other", "data": "imagefolder:images", "shift": "ood"},
        {"name": "third", "data": "imagefolder:images", "shift": "ood"},
    ]
    suite = {"name": "colours", "templates": "simple", "sets": sets}
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n")
    train = {
        "data": "imagefolder:images",
        "batch_size": 4,
        "steps": 2,
        "workers": 0,
        "architecture": tiny_clip_dir,
        "templates": "templates.txt",
    }
    path = tmp_path / "benchmark.yaml"
    write_benchmark(path, suite, train)
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods learn in this process; their names."""
    names: list[str] = []

    def learn(method: Any, run: Run) -> None:
        names.append(type(method).__name__)
        learned(method, run)

    monkeypatch.setattr(cells_module, "_apart", learn)
    return names
