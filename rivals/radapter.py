"""R-Adapter by the package's training, and the base itself."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.files import read_yaml
from radapter_serve.training import train
from radapter_serve.training.recipe import ready_recipes
from rivals.fit import Meter
from rivals.method import Method
from rivals.run import Run
from rivals.system import Cost, Learned, System
from rivals.variants import OWN, Variant
from rivals.variants import train as train_variant

# Fields of a ready recipe that the run sets, whatever learns.
OF_THE_DATA = ("task", "architecture", "pretrained", "classes", "shots", "seed", "precision")


class ZeroShot(Method):
    """The base; nothing learns."""

    def start(self, run: Run) -> System:
        return System(run.base)

    def learn(self, run: Run) -> Learned:
        return Learned(self.start(run), Cost())


@dataclass(frozen=True)
class RAdapter(Method):
    """R-Adapter, whose end is the adapter folded at α = 1: the line is the paper's re-scaling."""

    alpha: float | None = 0.5
    variant: Variant = OWN

    def start(self, run: Run) -> System:
        return System(run.base)

    def learn(self, run: Run) -> Learned:
        with tempfile.TemporaryDirectory() as folder:
            meter = Meter()
            recipe = dataclasses.replace(
                run.recipe, out=Path(folder) / "run", save_every=None, tracker="none"
            )
            plain = self.variant == OWN
            trained = train(recipe) if plain else train_variant(recipe, self.variant)
            adapter = load_adapter(trained)
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
    """Build R-Adapter by a ready recipe with changed fields; None as α is no re-scaling."""
    values: Mapping[str, Any] = read_yaml(ready_recipes()[recipe], "the recipe")
    settings = {name: value for name, value in values.items() if name not in OF_THE_DATA}
    # None is the recipe's value in a run of full length, and follows the length of a shorter one.
    follow = {name: None for name in ("momentum", "warmup_steps") if settings.get(name)}
    return RAdapter({**settings, **follow, **changes}, alpha, variant)
