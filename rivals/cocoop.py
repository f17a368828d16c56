"""CoCoOp: a context that a small network shifts for each image, so that every image has class
weights of its own.

Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022. Its code learns from
one image a step; `Recipe` takes two at least, so here it learns from two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from radapter_serve.clip.towers import encode_image, encode_text
from rivals.context import SETTINGS, Prompted, PromptLearning
from rivals.method import paper
from rivals.run import Run
from rivals.system import System


class Conditional(Prompted):
    """Context `v + π(f)` for an image's embedding f; π is linear, ReLU, linear, a sixteenth as wide
    as f between them.

    No image has the class weights of another, so what stands for an image is its scores of the
    classes that were embedded last, and what stands for a class says which of the scores is its
    own.
    """

    def __init__(self, run: Run, words: str | None, length: int) -> None:
        super().__init__(run, words, length)
        width = self.context.vectors.shape[1]
        features = self.model.visual.output_dim
        inner = features // 16
        self.net = nn.Sequential(nn.Linear(features, inner), nn.ReLU(), nn.Linear(inner, width))
        self.asked = self.prompts

    def scores(self, pixels: Tensor) -> Tensor:
        return self.scale * self._cosines(pixels, self.prompts)

    def _cosines(self, pixels: Tensor, prompts: Tensor) -> Tensor:
        images = encode_image(self.model, pixels)
        rows = []
        for image, shift in zip(images, self.net(images), strict=True):
            self.context.shift = shift
            rows.append(encode_text(self.model, prompts) @ image)
        self.context.shift = None
        return torch.stack(rows)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        self.asked = self.tokens(classes).to(self.device)
        return torch.eye(len(classes), device=self.device)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self._cosines(pixels, self.asked)


@dataclass(frozen=True)
class CoCoOp(PromptLearning):
    """Conditional context optimization.

    Attributes:
        length: vectors of the context.
        words: that the context starts as, of `length` tokens or more; None draws it at random. See
            `Prompted`.
    """

    settings: Mapping[str, Any] = paper(**SETTINGS, batch_size=2, epochs=10)
    length: int = 4
    words: str | None = "a photo of a"

    def start(self, run: Run) -> System:
        return Conditional(run, self.words, self.length)
