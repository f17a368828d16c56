"""R-Adapter itself, by the house's own training; and the base as it is."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.files import read_yaml
from radapter_serve.training import Recipe, train
from radapter_serve.training import Run as TrainedRun
from radapter_serve.training.recipe import ready_recipes
from rivals import loop
from rivals.fit import Meter
from rivals.method import Method
from rivals.run import Run
from rivals.system import Cost, Learned, System
from rivals.variants import OWN, Variant

OF_THE_DATA = (
    "task",
    "architecture",
    "pretrained",
    "classes",
    "shots",
    "seed",
    "precision",
)  # what a run brings, whatever learns


class ZeroShot(Method):
    """The base; nothing learns."""

    def start(self, run: Run) -> System:
        return System(run.base)

    def learn(self, run: Run) -> Learned:
        return Learned(self.start(run), Cost())


@dataclass(frozen=True)
class RAdapter(Method):
    """R-Adapter: its end is the adapter folded at α = 1, so that the line is the paper's
    re-scaling.

    Attributes:
        variant: what differs from its own training.
    """

    alpha: float | None = 0.5
    variant: Variant = OWN

    def start(self, run: Run) -> System:
        return System(run.base)

    def train(self, recipe: Recipe) -> TrainedRun:
        """Train adapters, by the house's own loop unless something differs."""
        return train(recipe) if self.variant == OWN else loop.train(recipe, self.variant)

    def learn(self, run: Run) -> Learned:
        with tempfile.TemporaryDirectory() as folder:
            meter = Meter()
            recipe = dataclasses.replace(
                run.recipe, out=Path(folder) / "run", save_every=None, tracker="none"
            )
            adapter = load_adapter(self.train(recipe))
            cost = meter.cost(sum(tensor.numel() for tensor in adapter.tensors.values()))
        system = self.start(run)
        system.model.load_state_dict(fold(run.base.model.state_dict(), adapter, 1.0))
        return Learned(system, cost)


def r_adapter(
    recipe: str,
    alpha: float | None = 0.5,
    variant: Variant = OWN,
    **changes: Any,
) -> RAdapter:
    """R-Adapter by a ready recipe of the house; warm-up and averaging follow the length of a
    shorter run.

    Args:
        recipe: its name, as `radapter-train --recipe` takes it.
        alpha: where on the line; None is the end, without re-scaling.
        variant: what differs from its own training.
        changes: other values of the recipe's fields, such as `rank`.
    """
    values: Mapping[str, Any] = read_yaml(ready_recipes()[recipe], "the recipe")
    own = {name: value for name, value in values.items() if name not in OF_THE_DATA}
    follow = {
        name: None for name in ("momentum", "warmup_steps") if own.get(name)
    }  # what none means at full length
    return RAdapter({**own, **follow, **changes}, alpha, variant)
