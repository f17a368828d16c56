"""Mask-Fill: full fine-tuning that keeps the pretrained features of images whose object is covered
by another image.

Xiao et al., Masked images are counterfactual samples for robust fine-tuning, CVPR 2023: object
masks, single fill. The relevance maps of Chefer, Gur and Wolf, Generic attention-model
explainability, ICCV 2021, find the object.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radapter_serve.clip.dense import check_dense
from rivals.full import Classifier, FullFineTuning
from rivals.method import paper
from rivals.run import Run
from rivals.system import Batch, System


class Masked(Classifier):
    """`CE(x) + weight · MSE(f(x̃), f₀(x̃))`: features f, those of the pretrained tower f₀, masked
    images x̃.

    A patch belongs to the object if it has more than `threshold` of the image's highest relevance.
    """

    def __init__(self, run: Run, threshold: float, weight: float) -> None:
        super().__init__(run)
        check_dense(self.model, "maskclip")  # relevance is that of open_clip's own transformer
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
        """Compute each patch's relevance for the score of the label, float [B, g, g], 0 or more.

        Through the blocks `R ← R + E[(A ∘ ∂score/∂A)⁺]·R` from the identity, E the mean over heads;
        the class token's row of R.
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
    """Collect the attention [B, heads, L, L] of each block of the tower as it is computed."""
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
    """Compute as `nn.MultiheadAttention` does, and keep the map of weights."""
    batch, length, width = x.shape
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (part.reshape(batch, length, layer.num_heads, -1).transpose(1, 2) for part in parts)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    maps.append(weights)
    return layer.out_proj((weights @ v).transpose(1, 2).reshape(batch, length, width)), None


@dataclass(frozen=True)
class MaskFill(FullFineTuning):
    """Full fine-tuning with the fields of `Masked`."""

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
    threshold: float = 0.3
    weight: float = 30.0

    def start(self, run: Run) -> System:
        system = Masked(run, self.threshold, self.weight)
        system.model.visual.requires_grad_(True)
        return system
