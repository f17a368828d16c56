"""FLYP: fine-tune both towers as CLIP was pretrained, by the contrast of images with prompts of
their classes.

Goyal et al., Finetune like you pretrain: Improved finetuning of zero-shot vision models, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.clip.towers import encode_image, encode_text
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Batch, System


class Flyp(System):
    """Every parameter learns; the other prompts of a batch are negatives, even those of the same
    class.
    """

    def forward(self, batch: Batch) -> Tensor:
        images = encode_image(self.model, batch["pixels"])
        texts = encode_text(self.model, self.tokenizer(batch["texts"]).to(self.device))
        scale: Tensor = self.model.logit_scale.exp()  # learns, too
        logits = scale * images.repeat_interleave(len(texts) // len(images), dim=0) @ texts.T
        targets = torch.arange(len(logits), device=self.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@dataclass(frozen=True)
class FineTuneLikePretrain(Method):
    """FLYP; with α it is WiSE-FLYP. Without `text` the image tower alone learns."""

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
        system = Flyp(run.base)
        (system.model if self.text else system.model.visual).requires_grad_(True)
        return system


# Liang et al., Open-vocabulary semantic segmentation with mask-adapted CLIP, CVPR 2023: crops of
# masks and their names, under a frozen text tower; without the second stage, whose learned prompts
# replace masked patches.
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
