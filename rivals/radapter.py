"""R-Adapter, trained by the package; the base alone; and R-Adapter with the regularizers of Table
5: dropout, drop path, and dropping per token.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from radapter_serve import training
from radapter_serve.adapter import Adapters, attach, fold, load_adapter
from radapter_serve.files import read_yaml
from radapter_serve.training.recipe import ready_recipes
from rivals.method import Cost, Learned, Meter, Method, Run, System


@dataclass(frozen=True)
class Variant:
    """Probabilities of dropping in training, in [0, 1): for `dropout` (DO of Table 5) each number
    of an adapter's output; for `drop_path` (DP) a residual branch of an adapted block, for each
    image or text; for `token_drop` an adapter at a token position, for the whole batch, as in the
    authors' code.
    """

    dropout: float = 0.0
    drop_path: float = 0.0
    token_drop: float = 0.0

    def attach(self, model: nn.Module, rank: int | None, *, form: Any, **how: Any) -> Adapters:
        """Attach adapters with this variant, as `radapter_serve.adapter.attach` does."""
        if self.dropout or self.token_drop:  # act on outputs, which the weight form never computes
            form = "activation"
        adapters = attach(model, rank, form=form, **how)

        def drop_outputs(x: Tensor, change: Any) -> Tensor:
            output = nn.functional.dropout(change(x), self.dropout, adapters.training)
            if adapters.training and self.token_drop:
                keep = torch.rand(x.shape[-2], 1, device=x.device) >= self.token_drop
                output = output * keep / (1 - self.token_drop)
            return output

        def drop_branches(module: nn.Module, args: Any, output: Any) -> Any:
            if not adapters.training:
                return output
            branch, *rest = output if isinstance(output, tuple) else (output,)
            keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
            branch = branch * keep / (1 - self.drop_path)
            return (branch, *rest) if isinstance(output, tuple) else branch

        for layer in adapters.layers if form == "activation" else ():
            layer.change = partial(drop_outputs, change=layer.change)  # type: ignore[assignment]
        for site in adapters.sites if self.drop_path else ():
            # Hook the last module of a branch, after the adapter.
            adapters.hooks.append(site.output.register_forward_hook(drop_branches))
        return adapters


OWN = Variant()  # changes nothing


# Fields of a ready recipe that are left to the run.
OF_THE_DATA = ("task", "architecture", "pretrained", "classes", "shots", "seed", "precision")


class ZeroShot(Method):
    """The base without training."""

    def start(self, run: Run) -> System:
        return System(run.base)

    def learn(self, run: Run) -> Learned:
        return Learned(self.start(run), Cost())


@dataclass(frozen=True)
class RAdapter(Method):
    """R-Adapter. Its end is the adapter folded at α = 1, so that the line from the start is the
    paper's re-scaling.
    """

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
            with patch("radapter_serve.training.setup.attach", self.variant.attach):
                adapter = load_adapter(training.train(recipe))
            cost = meter.cost(sum(tensor.numel() for tensor in adapter.tensors.values()))
        system = self.start(run)
        system.model.load_state_dict(fold(run.base.model.state_dict(), adapter, 1.0))
        return Learned(system, cost)


def r_adapter(
    recipe: str, alpha: float | None = 0.5, variant: Variant = OWN, **changes: Any
) -> RAdapter:
    """Build R-Adapter from a ready recipe with changed fields; `alpha` None is no re-scaling."""
    values: Mapping[str, Any] = read_yaml(ready_recipes()[recipe], "the recipe")
    settings = {name: value for name, value in values.items() if name not in OF_THE_DATA}
    # The recipe's values fit a run of full length; None lets them follow the length of the run.
    follow = {name: None for name in ("momentum", "warmup_steps") if settings.get(name)}
    return RAdapter({**settings, **follow, **changes}, alpha, variant)
