"""A CLIP with the parts that a method adds to it: the loss of a batch, and embeddings of images and
classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_text, encode_texts
from radapter_serve.contract.labels import split_label
from radapter_serve.data.rows import LabelledImages
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import zero_shot_classifier
from radapter_serve.training.loss import mpm_nce
from rivals.run import Run

# Pixels [B, 3, S, S] and labels [B] on the system's device, and B texts or more.
Batch = Mapping[str, Any]
Loss = Literal["classes", "infonce"]


class System(nn.Module):
    """A plain CLIP, all of it frozen; `scale` is 1/τ.

    Subclasses add parameters and modules, and unfreeze what learns.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model: Any = base.model
        self.tokenizer = base.tokenizer
        self.model.requires_grad_(False)
        self.scale = float(base.model.state_dict()["logit_scale"].exp())

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def factor(self) -> float:
        """The factor of the scores in the softmax that makes probabilities of them."""
        return self.scale

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} does not learn from batches")

    def after_step(self, step: int, steps: int) -> None:
        """Do nothing; called after each optimizer step, from 1 to `steps`."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed images [B, 3, S, S] as float32 [B, D]."""
        return encode_image(self.model, pixels)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as float32 [N, D] of unit length."""
        return encode_texts(self.model, self.tokenizer(list(texts)))

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed classes, synonyms after commas, as float32 [C, D]; the product with an image's
        embedding is its score.
        """
        return zero_shot_classifier(self.model, self.tokenizer, classes, templates)

    def clip(self) -> dict[str, Tensor] | None:
        """Return weights of a plain CLIP of the base's architecture that embeds alike, if any."""
        added = [name for name in self.state_dict() if not name.startswith("model.")]
        return None if added else self.model.state_dict()

    def learning(self) -> list[nn.Parameter]:
        """List the parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def labelled_images(run: Run) -> LabelledImages:
    """Return the data of a run, which must have labels."""
    if not isinstance(run.data, LabelledImages):
        raise RAdapterError("this rival learns from images with labels (task: classification)")
    return run.data


class Tuned(System):
    """A frozen CLIP with a few more parameters, in `extra` or anywhere else.

    The loss `classes` is the cross-entropy over the cosines between an image and a prompt of each
    class; `infonce` contrasts an image with the prompts of its batch, of which only its own is a
    positive. The prompts have the first template of the data, or `template`.
    """

    def __init__(self, run: Run, loss: Loss = "classes", template: str | None = None) -> None:
        super().__init__(run.base)
        self.loss = loss
        self.extra = nn.ModuleList()  # in training mode, where dropout acts, in `forward` alone
        self.template = template or ""
        if loss == "classes" or isinstance(run.data, LabelledImages):  # captions have no classes
            data = labelled_images(run)
            self.template = template or data.templates[0]
            self.register_buffer("prompts", self.tokens(data.classes), persistent=False)
        self.prompts: Tensor

    def tokens(self, classes: Iterable[str]) -> Tensor:
        """Tokenize prompts of the first names of classes: int64 [C, L]."""
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
        """Compute logits of the run's classes, float32 [B, C]."""
        return self.scale * self.embed_images(pixels) @ encode_text(self.model, self.prompts).T


@dataclass(frozen=True)
class Cost:
    """The number of parameters that learned, the seconds of all steps with the reading of images,
    and the peak memory in bytes, of the GPU if there is one, else of the process.
    """

    parameters: int = 0
    seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.seconds + other.seconds,
            max(self.memory, other.memory),
        )


@dataclass
class Learned:
    """A system in eval mode after its last step, and the tensors that learning changed, before and
    after.
    """

    system: System
    cost: Cost
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def at(self, alpha: float) -> System:
        """Set the system's weights to `(1−α)·start + α·end`."""
        state = self.system.state_dict()
        for name, end in self.end.items():
            state[name].copy_(torch.lerp(self.start[name].float(), end.float(), alpha))
        return self.system
