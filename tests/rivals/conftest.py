"""A run of a few steps of a tiny CLIP on coloured images, for any method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.sets import open_set
from radapter_serve.evaluation.suite import Entry, Suite
from rivals.run import Run
from tests.helpers.own_cache import own_cache as own_cache
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
