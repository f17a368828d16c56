"""Linear probing (LP), where the head alone learns, and LP-FT: full fine-tuning that starts from
the probe.

Kumar et al., Fine-tuning can distort pretrained features and underperform out-of-distribution, ICLR
2022. The probe's hyper-parameters are those of WiSE-FT's code, which like ours starts it as the
zero-shot classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rivals.fit import fit
from rivals.full import Classifier, FullFineTuning
from rivals.method import Method, learned, paper
from rivals.run import Run
from rivals.system import Learned, System


@dataclass(frozen=True)
class LinearProbe(Method):
    """LP."""

    settings: Mapping[str, Any] = paper(
        templates="openai",
        batch_size=128,
        epochs=10,
        learning_rate=1e-3,
        min_learning_rate=0.0,
        weight_decay=0.0,
        warmup_steps=0,
        grad_clip=1.0,
    )

    def start(self, run: Run) -> System:
        return Classifier(run)


@dataclass(frozen=True)
class ProbeThenFineTuning(FullFineTuning):
    """LP-FT; it takes the time of both, and the parameters of the second."""

    probe: LinearProbe = field(default_factory=LinearProbe)

    def learn(self, run: Run) -> Learned:
        probe = learned(self.probe, run)
        system = self.start(run)
        system.load_state_dict(probe.end, strict=False)
        found = fit(system, self.optimizer(system, run), run)
        cost = dataclasses.replace(probe.cost + found.cost, parameters=found.cost.parameters)
        return Learned(system, cost)
