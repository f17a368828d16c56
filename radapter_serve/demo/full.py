"""Full fine-tuning of the image tower, which the demo compares R-Adapter with; between start and
end lies WiSE-FT.

Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022: cross-entropy over a linear head
that starts as the zero-shot classifier. `rivals/full.py` of the project is the same for any data,
and has the paper's other systems too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.optim import AdamW

from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import linear_head, zero_shot_classifier
from radapter_serve.training import Recipe
from radapter_serve.training.batches import Examples, endless
from radapter_serve.training.setup import augmentation
from radapter_serve.training.tasks import open_data

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Ends:
    """A model and its classifier before and after learning.

    Attributes:
        start, end: weights of the CLIP.
        classifiers: [C, D] before and after, and [C] that is added to an image's scores; None where
            the text tower makes the classifier from the names of the classes.
    """

    start: Weights
    end: Weights
    classifiers: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def fine_tune(recipe: Recipe, *, quiet: bool = False) -> Ends:
    """Train all of the image tower and a linear head.

    Args:
        recipe: of classification; its batches are those that R-Adapter trained by the same seed
            sees.
        quiet: no progress bar.

    Raises:
        RAdapterError: an image can't be read, or the loss is not finite.
    """
    base = load_base(recipe.architecture, recipe.pretrained)
    data, _ = open_data(recipe, base)
    model: Any = base.model
    embeds = zero_shot_classifier(model, base.tokenizer, data.classes, data.templates)  # type: ignore[union-attr]
    head = linear_head(embeds, float(model.state_dict()["logit_scale"].exp()))
    model.requires_grad_(False).visual.requires_grad_(True)
    learning = [*model.visual.parameters(), *head.parameters()]
    optimizer = AdamW(learning, weight_decay=recipe.weight_decay)
    start = _copy(model.state_dict())
    first = _copy(head.state_dict())
    examples = Examples(data, augmentation(base, recipe), recipe.seed)
    source = endless(examples, recipe.batch_size, workers=recipe.workers)
    plan = recipe.resolved(None)
    for step in track(range(plan.steps), "Full fine-tuning", disable=quiet):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        _, batch = next(source)
        loss = F.cross_entropy(head(encode_image(model, batch["pixels"])), batch["labels"])
        if not math.isfinite(loss.item()):
            raise RAdapterError(
                f"the loss is {loss.item()} at step {step}; lower the learning rate"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    last = _copy(head.state_dict())
    return Ends(
        start,
        _copy(model.state_dict()),
        tuple((of["weight"], of["bias"]) for of in (first, last)),  # type: ignore[arg-type]
    )


def _copy(state: dict[str, Tensor]) -> Weights:
    return {name: value.detach().clone() for name, value in state.items()}
