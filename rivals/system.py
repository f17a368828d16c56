"""A CLIP, and what a method adds to it: the loss of a batch, and embeddings of images and
classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_texts
from radapter_serve.evaluation.classification import zero_shot_classifier

Batch = Mapping[
    str, Any
]  # pixels [B, 3, S, S] and labels [B] on the system's device, texts: B texts or more


class System(nn.Module):
    """A plain CLIP, all of it frozen; a method's own system overrides what it does otherwise.

    What learns is what requires a gradient. What a system has beside the CLIP are parameters and
    modules of its own.

    Args:
        base: whose model it takes, and changes.

    Attributes:
        scale: 1/τ of the base.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model: Any = base.model
        self.tokenizer = base.tokenizer
        self.model.requires_grad_(False)
        self.scale = float(base.model.state_dict()["logit_scale"].exp())

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @property
    def factor(self) -> float:
        """What scores are multiplied by before a softmax makes probabilities of them."""
        return self.scale

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not learn from batches")

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, from 1 to `steps`."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, S, S] to float32 [B, D]."""
        return encode_image(self.model, pixels)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to float32 [N, D], unit length."""
        return encode_texts(self.model, self.tokenizer(list(texts)))

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Classes, synonyms after commas, to float32 [C, D]: an image's score for each is the
        product with its own.
        """
        return zero_shot_classifier(self.model, self.tokenizer, classes, templates)

    def clip(self) -> dict[str, Tensor] | None:
        """Weights of a plain CLIP of the base's architecture that embeds alike; None where there
        are none.
        """
        own = [name for name in self.state_dict() if not name.startswith("model.")]
        return None if own else self.model.state_dict()

    def learning(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Cost:
    """What learning took.

    Attributes:
        parameters: that learned; of several models, all of theirs.
        seconds: of all steps, reading images included.
        memory: bytes at most: of the GPU where there is one, else of the process.
    """

    parameters: int = 0
    seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        return Cost(
            self.parameters + other.parameters,
            self.seconds + other.seconds,
            max(self.memory, other.memory),
        )


@dataclass
class Learned:
    """A system after its last step.

    Attributes:
        system: in eval mode.
        cost: of learning.
        start, end: the tensors of its state that learning has changed, as they were and as they
            are.
    """

    system: System
    cost: Cost
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def at(self, alpha: float) -> System:
        """The system with weights on the line from its start, α = 0, to its end, α = 1:
        `(1−α)·start + α·end`.
        """
        state = self.system.state_dict()
        for name, end in self.end.items():
            state[name].copy_(torch.lerp(self.start[name].float(), end.float(), alpha))
        return self.system
