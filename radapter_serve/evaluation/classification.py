"""Zero-shot classification: a classifier from class names, and its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from radapter_serve.clip.towers import encode_image, encode_texts
from radapter_serve.contract.labels import mean_embeddings
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import NOT_FINITE

Tokenizer = Callable[[list[str]], Tensor]


@torch.no_grad()
def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """One unit-length text embedding a class: the mean over its names and all templates.

    Args:
        model: an open_clip model, adapters attached or folded.
        tokenizer: list of N texts to token ids [N, L].
        classes: class names, synonyms after commas.
        templates: prompt templates with `{}`.
        batch_size: texts a pass.

    Returns:
        float32 [C, D], on the model's device.
    """

    def embed(texts: list[str]) -> NDArray[np.float32]:
        return np.asarray(encode_texts(model, tokenizer(texts), batch_size).cpu())

    embeds = mean_embeddings(embed, classes, templates)
    return torch.from_numpy(embeds).to(next(model.parameters()).device)


@torch.no_grad()
def linear_head(classifier: Tensor, scale: float) -> nn.Linear:
    """A head that gives images the logits of zero-shot classification, to learn from there.

    Args:
        classifier: [C, D] from `zero_shot_classifier`.
        scale: 1/τ of the model.
    """
    head = nn.Linear(classifier.shape[1], classifier.shape[0])
    head.weight.copy_(scale * classifier)
    head.bias.zero_()
    return head


@torch.no_grad()
def best_classes(model: nn.Module, classifier: Tensor, pixels: Tensor) -> Tensor:
    """The class that fits each image best, integer [B], on the CPU.

    Args:
        model: an open_clip model.
        classifier: [C, D] from `zero_shot_classifier`.
        pixels: [B, 3, S, S].

    Raises:
        RAdapterError: embeddings that are not finite.
    """
    scores = encode_image(model, pixels.to(classifier.device)) @ classifier.T
    if not scores.isfinite().all():
        raise RAdapterError(NOT_FINITE)
    return scores.argmax(dim=1).cpu()


def count_hits(
    model: nn.Module, classifier: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[int, int]:
    """How many images the best class is right for, and how many there are.

    Args:
        model: an open_clip model.
        classifier: [C, D] from `zero_shot_classifier`.
        batches: pairs of pixels [B, 3, S, S] and labels [B].

    Raises:
        RAdapterError: embeddings that are not finite.
    """
    hits = total = 0
    for pixels, labels in batches:
        hits += int((best_classes(model, classifier, pixels) == labels.cpu()).sum())
        total += len(labels)
    return hits, total
