"""CLIPood: fine-tune the image tower with margins that follow the classes' texts, and average it
along the way.

Shu et al., CLIPood: Generalizing CLIP to Out-of-Distributions, ICML 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.clip.towers import encode_texts
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Batch, System, Tuned


class Margins(Tuned):
    """Metric softmax against the frozen texts t: `cos(f, t_j) + λ·(1 − cos(t_y, t_j))` for an image
    of class y.

    At the end the image tower has the mean of its weights at all steps t = 0..T, weighed by the
    density of Beta(β, β) at (t + 1/2) / (T + 1), so that the first and the last weigh most.
    """

    def __init__(self, run: Run, margin: float, beta: float) -> None:
        super().__init__(run)
        self.margin = margin
        self.beta = beta
        self.register_buffer(
            "texts", encode_texts(self.model, self.prompts).detach(), persistent=False
        )
        self.texts: Tensor
        self.model.visual.requires_grad_(True)
        self.averages = [parameter.detach().clone() for parameter in self.learning()]
        self.weighed = 0.0

    def scores(self, pixels: Tensor) -> Tensor:
        return self.scale * self.embed_images(pixels) @ self.texts.T

    def forward(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        margins = self.margin * (1 - self.texts[labels] @ self.texts.T)
        return F.cross_entropy(self.scores(batch["pixels"]) + self.scale * margins, labels)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.weighed = self.weighed or self._density(0, steps)  # the averages are the start so far
        density = self._density(step, steps)
        self.weighed += density
        for number, parameter in enumerate(self.learning()):
            average = self.averages[number].to(parameter.device)
            self.averages[number] = average.lerp_(parameter, density / self.weighed)
            if step == steps:
                parameter.copy_(average)

    def _density(self, step: int, steps: int) -> float:
        """Compute the density of Beta(β, β) without its constant."""
        place = (step + 0.5) / (steps + 1)
        return float((place * (1 - place)) ** (self.beta - 1))


@dataclass(frozen=True)
class CLIPood(Method):
    """CLIPood by its command for 16-shot ImageNet; for shifts of domain the paper has β = 0.5."""

    settings: Mapping[str, Any] = paper(
        batch_size=36,
        epochs=10,
        learning_rate=5e-6,
        min_learning_rate=0.0,
        weight_decay=0.1,
        warmup_steps=0,
        grad_clip=None,
        crop_scale=0.7,
        flip=True,
    )
    margin: float = 0.3
    beta: float = 0.1

    def start(self, run: Run) -> System:
        return Margins(run, self.margin, self.beta)
