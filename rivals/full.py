"""Full fine-tuning (FT) of the image tower under a linear head that starts as the zero-shot
classifier; WiSE-FT; linear probing (LP), where the head alone learns; LP-FT.

Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, whose hyper-parameters these
are: WiSE-FT averages the weights of both ends, the head included.

Kumar et al., Fine-tuning can distort pretrained features and underperform out-of-distribution, ICLR
2022: LP-FT is full fine-tuning that starts from the probe. The probe's hyper-parameters are those
of WiSE-FT's code, which also starts it as the zero-shot classifier.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.contract.labels import split_label
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import linear_head, zero_shot_classifier
from rivals.fit import fit
from rivals.method import Method, learned, paper
from rivals.run import Run
from rivals.system import Batch, Learned, System, labelled_images


class Classifier(System):
    """An image tower under a linear head, which starts as the class embeddings times CLIP's logit
    scale.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        data = labelled_images(run)
        self.classes = list(data.classes)
        embeds = zero_shot_classifier(self.model, self.tokenizer, self.classes, data.templates)
        self.head = linear_head(embeds, self.scale)

    @property
    def factor(self) -> float:
        return 1.0  # it is in the head

    def forward(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch["pixels"]), batch["labels"])

    def logits(self, pixels: Tensor) -> Tensor:
        """Score images [B, 3, S, S] for all classes, [B, C]."""
        logits: Tensor = self.head(super().embed_images(pixels))
        return logits

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed images, with a 1 that meets the bias of the head."""
        return F.pad(super().embed_images(pixels), (0, 1), value=1.0)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Take the rows of the head, weights and bias, whatever the templates.

        Classes of the same name, such as both missiles of ImageNet, keep their order.
        """
        by_line: dict[str, list[int]] = {}
        by_name: dict[str, list[int]] = {}
        for row, line in enumerate(self.classes):
            by_line.setdefault(line, []).append(row)
            by_name.setdefault(split_label(line)[0], []).append(row)
        wanted = []
        before = Counter[str]()
        for line in classes:
            rows = by_line.get(line) or by_name.get(split_label(line)[0])
            if not rows:
                raise RAdapterError(f"the head has not learned the class {line!r}")
            wanted.append(rows[min(before[line], len(rows) - 1)])
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
    """LP-FT; its cost is the time of both, and the parameters of the second."""

    probe: LinearProbe = field(default_factory=LinearProbe)

    def learn(self, run: Run) -> Learned:
        probe = learned(self.probe, run)
        system = self.start(run)
        system.load_state_dict(probe.end, strict=False)
        second = fit(system, self.optimizer(system, run), run).cost
        cost = dataclasses.replace(probe.cost + second, parameters=second.parameters)
        return Learned(system, cost)
