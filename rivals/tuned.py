"""A frozen CLIP with a few parameters beside it, which learn to tell prompts apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radapter_serve.clip.towers import encode_text
from radapter_serve.contract.labels import split_label
from radapter_serve.data.rows import LabelledImages
from radapter_serve.errors import RAdapterError
from radapter_serve.training.loss import mpm_nce
from rivals.run import Run
from rivals.system import Batch, System

Loss = Literal["classes", "infonce"]


class Tuned(System):
    """Learns by cross-entropy over the cosines between an image and a prompt of each class, or by
    CLIP's own loss.

    Args:
        run: its base is taken, and the classes and the first template of its data.
        loss: `classes` compares each image with a prompt of every class; `infonce` with the prompts
            of its batch, of which the image's own is the one positive.
        template: with `{}` for the class, in place of the data's.

    Raises:
        RAdapterError: the data has no labels.
    """

    def __init__(self, run: Run, loss: Loss = "classes", template: str | None = None) -> None:
        super().__init__(run.base)
        self.loss = loss
        self.extra = (
            nn.ModuleList()
        )  # what a method adds; it drops out while it learns, and only then
        self.template = template or ""
        if isinstance(run.data, LabelledImages):
            self.template = template or run.data.templates[0]
            self.register_buffer("prompts", self.tokens(run.data.classes), persistent=False)
        elif loss == "classes":
            raise RAdapterError("this rival learns from images with labels (task: classification)")
        self.prompts: Tensor

    def tokens(self, classes: Iterable[str]) -> Tensor:
        """The prompts of classes, of each its first name: int64 [C, L]."""
        return self.tokenizer(
            [self.template.replace("{}", split_label(names)[0]) for names in classes]
        )

    def forward(self, batch: Batch) -> Tensor:
        self.extra.train()
        if self.loss == "infonce":
            texts = encode_text(self.model, self.tokenizer(batch["texts"]).to(self.device))
            pairs = torch.arange(len(texts), device=self.device)
            images = self.embed_images(batch["pixels"])
            loss = mpm_nce(images, texts, pairs, logit_scale=self.scale, delta=0.0)
        else:
            loss = F.cross_entropy(self.scores(batch["pixels"]), batch["labels"])
        self.extra.eval()
        return loss

    def scores(self, pixels: Tensor) -> Tensor:
        """Logits of the run's classes, float32 [B, C]."""
        return self.scale * self.embed_images(pixels) @ encode_text(self.model, self.prompts).T
