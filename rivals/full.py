"""Full fine-tuning with a linear head: FT, WiSE-FT, LP, LP-FT, uniform soup, Mask-Fill."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.clip.towers import check_dense, zero_shot_classifier
from radapter_serve.contract.labels import split_label
from radapter_serve.errors import RAdapterError
from rivals.method import (
    Batch,
    Cost,
    Learned,
    Method,
    Run,
    System,
    fit,
    labelled_images,
    learned,
    paper,
)

# FT and WiSE-FT. Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, with that
# paper's hyper-parameters. WiSE-FT averages the weights of both ends, including the head.
#
# LP and LP-FT. Kumar et al., Fine-tuning can distort pretrained features and underperform
# out-of-distribution, ICLR 2022. In LP, the probe, only the head learns; LP-FT is full fine-tuning
# from the probe. The probe's hyper-parameters, and its start as the zero-shot classifier, are those
# of WiSE-FT's code.


class Classifier(System):
    """An image tower with a linear head, which starts as the class embeddings times CLIP's logit
    scale.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.base)
        data = labelled_images(run)
        self.classes = list(data.classes)
        embeds = zero_shot_classifier(self.model, self.tokenizer, self.classes, data.templates)
        self.head = torch.nn.Linear(embeds.shape[1], embeds.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(self.scale * embeds)
            self.head.bias.zero_()

    @property
    def factor(self) -> float:
        return 1.0  # the head includes the scale

    def forward(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch["pixels"]), batch["labels"])

    def logits(self, pixels: Tensor) -> Tensor:
        """Score images [B, 3, S, S] for all classes, [B, C]."""
        logits: Tensor = self.head(super().embed_images(pixels))
        return logits

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed images, with a 1 appended for the bias of the head."""
        return F.pad(super().embed_images(pixels), (0, 1), value=1.0)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return rows of the head, weights and bias; ignores the templates.

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
    """FT; with an α, WiSE-FT."""

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
        system = self.classifier(run)
        system.model.visual.requires_grad_(True)
        return system

    def classifier(self, run: Run) -> Classifier:
        """Build the system whose image tower learns."""
        return Classifier(run)


@dataclass(frozen=True)
class LinearProbe(Method):
    """LP: only the linear head learns."""

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
    """LP-FT. Its cost is the time of both stages, and the parameters of the second."""

    probe: LinearProbe = field(default_factory=LinearProbe)

    def learn(self, run: Run) -> Learned:
        probe = learned(self.probe, run)
        system = self.start(run)
        system.load_state_dict(probe.end, strict=False)
        second = fit(system, self.optimizer(system, run), run).cost
        cost = dataclasses.replace(probe.cost + second, parameters=second.parameters)
        return Learned(system, cost)


# Uniform soup. Wortsman et al., Model soups: averaging weights of multiple fine-tuned models
# improves accuracy without increasing inference time, ICML 2022. Their list of 72 models starts
# with the linear probe from which all others start. Ours draws learning rate, weight decay,
# smoothing, mixup and epochs from the ranges of that list, without RandAugment.


class Mixed(Classifier):
    """A classifier trained on mixed images and smoothed labels. The share of an image is drawn from
    Beta(`mixup`, `mixup`); 0 mixes no images.
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

    def classifier(self, run: Run) -> Classifier:
        return Mixed(run, self.smoothing, self.mixup)


@dataclass(frozen=True)
class UniformSoup(FullFineTuning):
    """The mean of the probe and of `members - 1` models fine-tuned from it; at least 2 in all."""

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
        """List the probe and its fine-tuned models; smaller soups are prefixes of larger ones."""
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
    """Set the size of a soup; other methods are returned unchanged."""
    return (
        dataclasses.replace(method, members=members) if isinstance(method, UniformSoup) else method
    )


# Mask-Fill keeps the pretrained features of images whose object is covered by another image. Xiao
# et al., Masked images are counterfactual samples for robust fine-tuning, CVPR 2023: object masks,
# single fill. The object is found by the relevance maps of Chefer, Gur and Wolf, Generic
# attention-model explainability, ICCV 2021.


class Masked(Classifier):
    """`CE(x) + weight · MSE(f(x̃), f₀(x̃))` with features f, features f₀ of the pretrained tower,
    and masked images x̃.

    A patch belongs to the object if its relevance exceeds `threshold` of the image's highest.
    """

    def __init__(self, run: Run, threshold: float, weight: float) -> None:
        super().__init__(run)
        check_dense(self.model, "maskclip")  # relevance needs open_clip's own transformer
        self.threshold = threshold
        self.weight = weight
        self.teacher: Any = copy.deepcopy(self.model.visual)

    def forward(self, batch: Batch) -> Tensor:
        pixels = batch["pixels"]
        labels = batch["labels"]
        masked = self.filled(
            pixels, self.object_patches(pixels, labels), torch.randperm(len(pixels))
        )
        with torch.no_grad():
            wanted = self.teacher(masked)
        return super().forward(batch) + self.weight * F.mse_loss(self.model.visual(masked), wanted)

    def object_patches(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Mark the patches of the object, bool [B, g, g]."""
        relevance = self.relevance(pixels, labels)
        highest = relevance.amax(dim=(1, 2), keepdim=True)
        return relevance > self.threshold * highest

    def filled(self, pixels: Tensor, patches: Tensor, others: Tensor) -> Tensor:
        """Replace the marked patches [B, g, g] of images by those of the images `others` [B]."""
        mask = F.interpolate(patches[:, None].float(), size=pixels.shape[2:], mode="nearest").bool()
        return torch.where(mask, pixels[others], pixels)

    def relevance(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Compute each patch's relevance for the label's score, float [B, g, g], 0 or more.

        The result is the class token's row of R. R starts as the identity, and each block computes
        `R ← R + E[(A ∘ ∂score/∂A)⁺]·R`; E is the mean over heads.
        """
        with torch.enable_grad(), _seen(self.model.visual) as maps:
            score = self.logits(pixels).gather(1, labels[:, None]).sum()
            slopes = torch.autograd.grad(score, maps)
        length = maps[0].shape[-1]
        relevance = torch.eye(length, device=pixels.device).repeat(len(pixels), 1, 1)
        for attention, slope in zip(maps, slopes, strict=True):
            relevance = (
                relevance
                + (attention.detach() * slope).clamp(min=0).mean(dim=1).float() @ relevance
            )
        return relevance[:, 0, 1:].reshape(-1, *self.model.visual.grid_size)


@contextmanager
def _seen(visual: Any) -> Iterator[list[Tensor]]:
    """Collect the attention [B, heads, L, L] of each block of the tower within the block."""
    maps: list[Tensor] = []
    layers = [block.attn for block in visual.transformer.resblocks]
    for layer in layers:
        layer.forward = functools.partial(_attend, layer, maps)
    try:
        yield maps
    finally:
        for layer in layers:
            del layer.forward


def _attend(
    layer: Any, maps: list[Tensor], x: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend as `nn.MultiheadAttention` does, and keep the attention weights."""
    batch, length, width = x.shape
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (part.reshape(batch, length, layer.num_heads, -1).transpose(1, 2) for part in parts)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    maps.append(weights)
    return layer.out_proj((weights @ v).transpose(1, 2).reshape(batch, length, width)), None


@dataclass(frozen=True)
class MaskFill(FullFineTuning):
    """Full fine-tuning with Mask-Fill; the fields are those of `Masked`."""

    threshold: float = 0.3
    weight: float = 30.0

    def classifier(self, run: Run) -> Classifier:
        return Masked(run, self.threshold, self.weight)
