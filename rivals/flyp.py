"""Fine-tuning by contrast with texts, without a head: FLYP, mask-adapted CLIP, CLIPood."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.clip.towers import encode_image, encode_text, encode_texts
from radapter_serve.training.loop import other_prompts
from rivals.method import Batch, Method, Run, System, Tuned, labelled_images, paper

# FLYP fine-tunes both towers with CLIP's pretraining loss, the contrast of images with prompts of
# their classes. Goyal et al., Finetune like you pretrain: Improved finetuning of zero-shot vision
# models, CVPR 2023.


class Flyp(System):
    """A CLIP whose parameters all learn; the other prompts of a batch are negatives, even those of
    the same class. With `negative_classes`, which is not of the paper, so are prompts of as many
    classes that the batch lacks.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        self.run = run
        self.draw = random.Random(run.recipe.seed)

    def forward(self, batch: Batch) -> Tensor:
        texts = list(batch["texts"])
        if more := self.run.recipe.negative_classes:
            present = set(batch["labels"].tolist())
            texts += other_prompts(labelled_images(self.run), present, more, self.draw).values()
        images = encode_image(self.model, batch["pixels"])
        pairs = torch.arange(len(batch["texts"]), device=self.device)
        images = images.repeat_interleave(len(pairs) // len(images), dim=0)
        scale: Tensor = self.model.logit_scale.exp()  # a parameter that learns
        embeds = encode_text(self.model, self.tokenizer(texts).to(self.device))
        logits = scale * images @ embeds.T
        of_texts = F.cross_entropy(logits[:, : len(pairs)].T, pairs)
        return (F.cross_entropy(logits, pairs) + of_texts) / 2


@dataclass(frozen=True)
class FineTuneLikePretrain(Method):
    """FLYP; with α it is WiSE-FLYP. Without `text` only the image tower learns."""

    settings: Mapping[str, Any] = paper(
        templates="openai",
        batch_size=512,
        epochs=10,
        learning_rate=1e-5,
        min_learning_rate=0.0,
        weight_decay=0.1,
        warmup_steps=None,
        grad_clip=None,
    )
    text: bool = True

    def start(self, run: Run) -> System:
        system = Flyp(run)
        (system.model if self.text else system.model.visual).requires_grad_(True)
        return system


# Liang et al., Open-vocabulary semantic segmentation with mask-adapted CLIP, CVPR 2023: trained on
# crops of masks and their names, under a frozen text tower. The second stage, whose learned prompts
# replace masked patches, is left out.
MASK_ADAPTED = FineTuneLikePretrain(
    settings={
        "templates": "simple",
        "batch_size": 128,
        "epochs": 5,
        "learning_rate": 5e-6,
        "min_learning_rate": 0.0,
        "weight_decay": 0.2,
        "warmup_steps": None,
        "grad_clip": None,
        "mask_square": False,
    },
    text=False,
)


# CLIPood fine-tunes the image tower with margins by the similarity of the classes' texts, and
# averages the weights over the steps. Shu et al., CLIPood: Generalizing CLIP to
# Out-of-Distributions, ICML 2023.


class Margins(Tuned):
    """Metric softmax against the frozen texts t: `cos(f, t_j) + λ·(1 − cos(t_y, t_j))` for an image
    of class y.

    After training, the image tower has the mean of its weights at all steps t = 0..T, weighted by
    the density of Beta(β, β) at (t + 1/2) / (T + 1), so that the first and the last weigh most.
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
        self.weighed = self.weighed or self._density(0, steps)  # at first, the averages are step 0
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
    """CLIPood by its command for 16-shot ImageNet; for domain shifts the paper uses β = 0.5."""

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
