"""A short run of a tiny model, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from radapter_serve.training import Recipe

COMMON: dict[str, Any] = {
    "batch_size": 8,
    "steps": 8,
    "warmup_steps": 2,
    "learning_rate": 3e-3,
    "momentum": 0.5,
    "save_every": 4,
    "workers": 0,
    "tracker": "none",
}


def short_run(architecture: str, folder: Path, **fields: Any) -> Recipe:
    """Eight steps that learn fast, into `run` in a folder; the fields say what from."""
    return Recipe(architecture=architecture, out=folder / "run", **COMMON | fields)


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
