"""Full fine-tuning (FT) of the image tower under a linear head that starts as the zero-shot
classifier.

Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, whose hyper-parameters these
are. With α it is WiSE-FT, their method: the weights of both ends, the head's among them, are
averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.contract.labels import split_label
from radapter_serve.data.rows import LabelledImages
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import linear_head, zero_shot_classifier
from rivals.method import Method, paper
from rivals.run import Run
from rivals.system import Batch, System


class Classifier(System):
    """An image tower under a linear head; the head starts with the class embeddings times CLIP's
    logit scale.

    Args:
        run: gives the base, and the classes and templates of its data.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        if not isinstance(run.data, LabelledImages):
            raise RAdapterError("this rival learns from images with labels (task: classification)")
        self.classes = list(run.data.classes)
        embeds = zero_shot_classifier(self.model, self.tokenizer, self.classes, run.data.templates)
        self.head = linear_head(embeds, self.scale)

    @property
    def factor(self) -> float:
        return 1.0  # the head has learned it

    def forward(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch["pixels"]), batch["labels"])

    def logits(self, pixels: Tensor) -> Tensor:
        """Scores of images [B, 3, S, S] for all classes, [B, C]."""
        logits: Tensor = self.head(super().embed_images(pixels))
        return logits

    def embed_images(self, pixels: Tensor) -> Tensor:
        """The embedding and a 1, which meets the bias of the head."""
        return F.pad(super().embed_images(pixels), (0, 1), value=1.0)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Rows of the head, weights and bias, whatever the templates; of a class that it has not
        learned there is none.

        Of classes of one name, such as both missiles of ImageNet, the first here is the first that
        it has learned.

        Raises:
            RAdapterError: the head has no such class.
        """
        by_line: dict[str, list[int]] = {}
        by_name: dict[str, list[int]] = {}
        for row, line in enumerate(self.classes):
            by_line.setdefault(line, []).append(row)
            by_name.setdefault(split_label(line)[0], []).append(row)
        wanted = []
        before = Counter[str]()
        for line in classes:
            found = by_line.get(line) or by_name.get(split_label(line)[0])
            if not found:
                raise RAdapterError(f"the head has not learned the class {line!r}")
            wanted.append(found[min(before[line], len(found) - 1)])
            before[line] += 1
        head = torch.cat([self.head.weight, self.head.bias[:, None]], dim=1)
        return head[wanted].float()


@dataclass(frozen=True)
class FullFineTuning(Method):
    """FT; with α it is WiSE-FT."""

    settings: Mapping[str, Any] = paper(
        templates="openai",
        batch_size=512,
        epochs=10,
        learning_rate=3e-5,
        min_learning_rate=0.0,
        weight_decay=0.1,
        warmup_steps=None,
        grad_clip=1.0,
    )

    def start(self, run: Run) -> System:
        system = Classifier(run)
        system.model.visual.requires_grad_(True)
        return system
