"""Uniform soup: the mean of the weights of many models, fine-tuned by different hyper-parameters.

Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time, ICML 2022. Their code's list of 72 models starts with the linear
probe that all others start from. Ours draws learning rate, weight decay, smoothing, mixup and
epochs in the ranges of that list, but no RandAugment.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.errors import RAdapterError
from rivals.full import Classifier, FullFineTuning, ProbeThenFineTuning
from rivals.method import Method, learned, paper
from rivals.run import Run
from rivals.system import Batch, Cost, Learned, System


class Mixed(Classifier):
    """A classifier of mixed images and smoothed labels; `mixup` is both parameters of the Beta
    distribution of the share of an image, 0 mixes none.
    """

    def __init__(self, run: Run, smoothing: float, mixup: float) -> None:
        super().__init__(run)
        self.smoothing = smoothing
        self.mixup = mixup

    def forward(self, batch: Batch) -> Tensor:
        pixels = batch["pixels"]
        labels = F.one_hot(batch["labels"], len(self.classes)).float()
        if self.mixup:
            share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
            others = torch.randperm(len(pixels), device=pixels.device)
            pixels = share * pixels + (1 - share) * pixels[others]
            labels = share * labels + (1 - share) * labels[others]
        return F.cross_entropy(self.logits(pixels), labels, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class Ingredient(ProbeThenFineTuning):
    """A fine-tuned model of the soup, with the fields of `Mixed`."""

    smoothing: float = 0.0
    mixup: float = 0.0

    def start(self, run: Run) -> System:
        system = Mixed(run, self.smoothing, self.mixup)
        system.model.visual.requires_grad_(True)
        return system


@dataclass(frozen=True)
class UniformSoup(FullFineTuning):
    """The mean of the probe and of `members - 1` models fine-tuned from it, 2 or more in all."""

    settings: Mapping[str, Any] = paper(
        templates="openai",
        batch_size=512,
        learning_rate=1e-5,
        min_learning_rate=0.0,
        warmup_steps=None,
        grad_clip=1.0,
    )
    members: int = 72

    def recipes(self) -> list[Method]:
        """List the probe and its fine-tuned models; a smaller soup has the first of them."""
        if self.members < 2:
            raise RAdapterError(f"a soup has {self.members} members; allowed: 2 or more")
        drawn = (self._ingredient(random.Random(number)) for number in range(1, self.members))
        return [ProbeThenFineTuning().probe, *drawn]

    def _ingredient(self, draw: random.Random) -> Method:
        settings = {
            **self.settings,
            "learning_rate": self.settings["learning_rate"] * 10 ** draw.uniform(-1, 1),
            "weight_decay": 10 ** draw.uniform(-4.2, -0.2),
            "epochs": draw.randint(4, 16),
        }
        smoothing = draw.choice((0.0, draw.uniform(0, 0.25)))
        return Ingredient(
            settings, smoothing=smoothing, mixup=draw.choice((0.0, draw.uniform(0, 0.9)))
        )

    def learn(self, run: Run) -> Learned:
        system = self.start(run)
        recipes = self.recipes()
        mean = {name: value.clone() for name, value in system.state_dict().items()}
        cost = Cost()
        for recipe in recipes:
            member = learned(recipe, run)
            for name, end in member.end.items():
                mean[name] += (end - member.start[name]) / len(recipes)
            cost += dataclasses.replace(
                member.cost, parameters=sum(p.numel() for p in system.learning())
            )
        system.load_state_dict(mean)
        return Learned(system, cost)


def of_members(method: Method, members: int) -> Method:
    """Set the size of a soup; leave any other method as it is."""
    return (
        dataclasses.replace(method, members=members) if isinstance(method, UniformSoup) else method
    )
