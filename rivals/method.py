"""Methods: hyper-parameters, and how a system starts and learns by them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import AdamW, Optimizer

from radapter_serve.files import staged
from rivals.fit import fit
from rivals.run import Run
from rivals.system import Cost, Learned, System


def paper(**values: Any) -> Any:
    """Set the default of `settings`: fields of `Recipe` by the method's paper or its code."""
    return field(default_factory=lambda: values)


@dataclass(frozen=True)
class Method:
    """A system of the paper's tables.

    `settings` are fields of `Recipe`, and `alpha` is the place of the weights on the line between
    start and end, None the end. Subclasses add their paper's other hyper-parameters.
    """

    settings: Mapping[str, Any] = paper()
    alpha: float | None = None

    def start(self, run: Run) -> System:
        """Build the system on the run's base, with the parameters that learn unfrozen."""
        raise NotImplementedError

    def optimizer(self, system: System, run: Run) -> Optimizer:
        """Build the optimizer of the parameters that learn."""
        recipe = run.recipe
        return AdamW(system.learning(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)

    def learn(self, run: Run) -> Learned:
        """Train a system; `run` has this method's settings."""
        system = self.start(run)
        return fit(system, self.optimizer(system, run), run)


def at_rate(method: Method, factor: float) -> Method:
    """Multiply a method's learning rate, if it has one, by a factor."""
    rate = method.settings.get("learning_rate")
    return method if rate is None or factor == 1 else with_rate(method, rate * factor)


def with_rate(method: Method, rate: float) -> Method:
    """Replace a method's learning rate."""
    return dataclasses.replace(method, settings={**method.settings, "learning_rate": rate})


def learned(method: Method, run: Run) -> Learned:
    """Train a method on the data of a run, or read the system that the run's folder keeps."""
    path = kept(method, run)
    run = run.of(method.settings)
    if path.exists():
        with safe_open(path, "pt") as file:
            end = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            result = Learned(method.start(run).eval(), Cost(**json.loads(file.metadata()["cost"])))
        start = result.system.state_dict()
        result.start = {name: start[name].clone() for name in end}
        result.end = end
        result.at(1.0)
        return result
    start = method.start(run).state_dict()
    result = method.learn(run.of(method.settings))
    end = {name: value.detach().cpu().clone() for name, value in result.system.state_dict().items()}
    changed = [name for name, value in end.items() if not torch.equal(value, start[name])]
    result.start = {name: start[name] for name in changed}
    result.end = {name: end[name] for name in changed}
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        tensors = {name: value.contiguous() for name, value in result.end.items()}
        save_file(tensors, temporary, {"cost": json.dumps(dataclasses.asdict(result.cost))})
    return result


def kept(method: Method, run: Run) -> Path:
    """Name the file that keeps the learned system, for any α."""
    digest = run.of(method.settings).digest(dataclasses.replace(method, alpha=None))
    return run.folder / f"{type(method).__name__}-{run.recipe.seed}-{digest}.safetensors"
