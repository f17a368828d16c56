"""A method: hyper-parameters, and how a system starts and learns by them."""

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
    """The default of `settings`: fields of `Recipe` as the method's own paper, or its code, sets
    them.
    """
    return field(default_factory=lambda: values)


@dataclass(frozen=True)
class Method:
    """One of the systems of the paper's tables; further fields are what its own paper sets beside
    the recipe.

    Attributes:
        settings: fields of `Recipe`, by name.
        alpha: where on the line between start and end its weights are taken; None takes the end.
    """

    settings: Mapping[str, Any] = paper()
    alpha: float | None = None

    def start(self, run: Run) -> System:
        """The system before its first step, which says what learns, on the run's own base."""
        raise NotImplementedError

    def optimizer(self, system: System, run: Run) -> Optimizer:
        """The optimizer of what learns."""
        recipe = run.recipe
        return AdamW(system.learning(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)

    def learn(self, run: Run) -> Learned:
        """The system after its last step; `run` has this method's settings."""
        system = self.start(run)
        return fit(system, self.optimizer(system, run), run)


def at_rate(method: Method, factor: float) -> Method:
    """The method with its learning rate times a factor; itself where it has none, or the factor is
    1.
    """
    rate = method.settings.get("learning_rate")
    return method if rate is None or factor == 1 else with_rate(method, rate * factor)


def with_rate(method: Method, rate: float) -> Method:
    """The method with a learning rate in place of its own."""
    return dataclasses.replace(method, settings={**method.settings, "learning_rate": rate})


def learned(method: Method, run: Run) -> Learned:
    """What a method learns from a run; what was learned before is read from the run's folder.

    Args:
        method: learns, by its own settings.
        run: of any method.

    Returns:
        With the tensors that learning has changed, which `Learned.at` needs.
    """
    path = kept(method, run)
    run = run.of(method.settings)
    if path.exists():
        with safe_open(path, "pt") as file:
            end = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            found = Learned(method.start(run).eval(), Cost(**json.loads(file.metadata()["cost"])))
        start = found.system.state_dict()
        found.start = {name: start[name].clone() for name in end}
        found.end = end
        found.at(1.0)
        return found
    start = method.start(run).state_dict()
    found = method.learn(run.of(method.settings))
    end = {name: value.detach().cpu().clone() for name, value in found.system.state_dict().items()}
    changed = [name for name, value in end.items() if not torch.equal(value, start[name])]
    found.start, found.end = ({name: of[name] for name in changed} for of in (start, end))
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        tensors = {name: value.contiguous() for name, value in found.end.items()}
        save_file(tensors, temporary, {"cost": json.dumps(dataclasses.asdict(found.cost))})
    return found


def kept(method: Method, run: Run) -> Path:
    """The file in which what a method learns from a run is kept; a method's α makes no
    difference.
    """
    digest = run.of(method.settings).digest(dataclasses.replace(method, alpha=None))
    return run.folder / f"{type(method).__name__}-{run.recipe.seed}-{digest}.safetensors"
