"""A run of a method: its recipe, and the base and the data that the recipe names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from radapter_serve.clip.base import Base, load_base
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.training import Recipe
from radapter_serve.training.tasks import Data, open_data


class Run:
    """The base, the data and the recipe of a method.

    Args:
        fields: of `Recipe`, for every method: the base, the data, the seed, and what else is not
            left to the methods' papers.
        folder: keeps the learned systems.
        settings: fields of `Recipe` by the method's paper; those for every method override them.
    """

    def __init__(
        self, fields: Mapping[str, Any], folder: Path, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.fields = dict(fields)
        self.folder = folder
        # Without defaults of Recipe, so that a new default changes no digest.
        self.asked = {**(settings or {}), **fields}
        self.recipe = Recipe(**self.asked)
        self.recipe.check()
        if self.recipe.streaming or self.recipe.precision == "fp16":
            raise RAdapterError(
                "rivals are trained without --streaming, and with precision no or bf16"
            )

    def of(self, settings: Mapping[str, Any]) -> Run:
        """Build a run of the same data by another method's settings, with a fresh base; a batch is
        all of the data at most.
        """
        most = min(settings.get("batch_size", 0), self.size)
        run = Run(self.fields, self.folder, {**settings, "batch_size": most} if most else settings)
        run.ground = self.ground
        run.size = self.size
        return run

    @cached_property
    def base(self) -> Base:
        """The base, for one system, which changes it; loading it sets torch's seed."""
        base = load_base(self.recipe.architecture, self.recipe.pretrained)
        torch.manual_seed(self.recipe.seed)
        return base

    @cached_property
    def data(self) -> Data:
        """The training data."""
        return open_data(self.recipe, self.base)[0]

    @cached_property
    def size(self) -> int:
        """The number of images, the same for all methods."""
        return len(self.data.rows)

    @cached_property
    def ground(self) -> str:
        """A digest of the base's weights and the images' names, the same for all methods."""
        weights = self.base.model.state_dict()
        images = json.dumps([held_out_digest(self.data), self.size]).encode()
        return digest_of(images, *(weights[name].numpy().tobytes() for name in sorted(weights)))

    def digest(self, *facts: object) -> str:
        """Compute sixteen letters from facts, the recipe's fields, the base and the images."""
        # The weights of the base are in `ground`.
        without = ("workers", "threads", "architecture", "pretrained")
        asked = {
            name: moved(str(value) if isinstance(value, Path) else value)
            for name, value in self.asked.items()
            if name not in without
        }
        text = json.dumps([*map(repr, facts), asked, self.ground], sort_keys=True)
        return digest_of(text.encode()).removeprefix("sha256:")[:16]


def moved(value: Any) -> Any:
    """Replace an absolute path in a setting by the file's digest or the folder's name."""
    reader, colon, place = str(value).rpartition(":")
    if not Path(place).is_absolute():
        return value
    path = Path(place)
    return f"{reader}{colon}{digest_of(path.read_bytes()) if path.is_file() else path.name}"
