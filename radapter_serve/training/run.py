"""What training gives: a run, whose folder other functions and commands take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from radapter_serve.runs import ADAPTER
from radapter_serve.training.recipe import Recipe


@dataclass(frozen=True)
class Run(PathLike[str]):
    """A finished run; wherever a run's folder is asked for, a `Run` will do.

    Attributes:
        folder: `adapter.safetensors`, `recipe.yaml`, `metrics.jsonl`, `checkpoint.pt` and the
            tracker's files.
        recipe: that it was trained by, with a batch that the data can fill.
        metrics: what the last validation measured, in per cent, by measure and α, such as
            `acc1@alpha=0.5`; empty without validation data.
        notes: what its user should know, a line each: of images that were left out, and of an
            average that keeps little.
    """

    folder: Path
    recipe: Recipe
    metrics: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def adapter(self) -> Path:
        """The adapter file."""
        return self.folder / ADAPTER

    def __fspath__(self) -> str:
        return str(self.folder)
