"""One run of a method: its recipe, and the base and the data that the recipe names."""

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
    """All that a method learns from.

    Args:
        given: fields of `Recipe` that hold for every method: the base, the data, the seed, and
            whatever else is not left to a method's own settings.
        folder: where learned systems are kept, so that none is learned twice.
        settings: fields of `Recipe` as the method's paper sets them; `given` has the last word.
    """

    def __init__(
        self, given: Mapping[str, Any], folder: Path, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.given = dict(given)
        self.folder = folder
        self.asked = {
            **(settings or {}),
            **given,
        }  # a default of Recipe that changes is no other run
        self.recipe = Recipe(**self.asked)
        self.recipe.check()
        if self.recipe.streaming or self.recipe.precision == "fp16":
            raise RAdapterError(
                "rivals are trained without --streaming, and with precision no or bf16"
            )

    def of(self, settings: Mapping[str, Any]) -> Run:
        """A run of the same data by another method's settings, its base fresh; a batch is all of
        the data at most.
        """
        most = min(settings.get("batch_size", 0), self.size)
        run = Run(self.given, self.folder, {**settings, "batch_size": most} if most else settings)
        run.ground = self.ground
        run.size = self.size
        return run

    @cached_property
    def base(self) -> Base:
        """The base, which belongs to the system that starts from it; what starts now draws by the
        recipe's seed.
        """
        base = load_base(self.recipe.architecture, self.recipe.pretrained)
        torch.manual_seed(self.recipe.seed)
        return base

    @cached_property
    def data(self) -> Data:
        """The training data."""
        return open_data(self.recipe, self.base)[0]

    @cached_property
    def size(self) -> int:
        """The number of images, which no method's settings change."""
        return len(self.data.rows)

    @cached_property
    def ground(self) -> str:
        """A digest of the base's weights and of the names of the images, which no method's settings
        change.
        """
        weights = self.base.model.state_dict()
        images = json.dumps([held_out_digest(self.data), self.size]).encode()
        return digest_of(images, *(weights[name].numpy().tobytes() for name in sorted(weights)))

    def digest(self, *facts: object) -> str:
        """Sixteen letters that differ where the facts, what is asked for, the base or the images
        do.
        """
        without = (
            "workers",
            "threads",
            "architecture",
            "pretrained",
        )  # the base's weights are in `ground`
        asked = {
            name: moved(str(value) if isinstance(value, Path) else value)
            for name, value in self.asked.items()
            if name not in without
        }
        text = json.dumps([*map(repr, facts), asked, self.ground], sort_keys=True)
        return digest_of(text.encode()).removeprefix("sha256:")[:16]


def moved(value: Any) -> Any:
    """A setting, but of an absolute path what is there in place of the path: a file's digest, a
    folder's name.
    """
    reader, colon, place = str(value).rpartition(":")
    if not Path(place).is_absolute():
        return value
    path = Path(place)
    return f"{reader}{colon}{digest_of(path.read_bytes()) if path.is_file() else path.name}"
