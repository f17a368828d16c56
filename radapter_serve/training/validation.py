"""Validation on the way: each task's measure at the recipe's α and at 1, over all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from radapter_serve.adapter import Adapters
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_texts
from radapter_serve.data import Captioned, LabelledImages
from radapter_serve.evaluation.batches import evaluation_batches
from radapter_serve.evaluation.classification import count_hits, zero_shot_classifier
from radapter_serve.evaluation.metrics import caption_groups, retrieval_metrics
from radapter_serve.training.recipe import Recipe


def validate(
    base: Base,
    adapters: Adapters,
    val: LabelledImages | Captioned,
    recipe: Recipe,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Measure the adapters as they are; every process calls it.

    Args:
        base: with the adapters attached.
        adapters: their α is 1 afterwards.
        val: validation data; images with captions are evaluated by retrieval.
        recipe: gives α, and what broken images do.
        accelerator: whose processes share the work.

    Returns:
        In per cent, by measure and α: zero-shot accuracy, or recall at 1 both ways.
    """
    alphas = sorted({recipe.alpha, 1.0})
    share: dict[str, Any] = {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "broken": [] if recipe.on_broken == "skip" else None,
    }
    if isinstance(val, Captioned):
        found = _retrieval(base, adapters, val, alphas, share)
    else:
        found = _classification(base, adapters, val, alphas, share, accelerator)
    adapters.alpha = 1.0
    return {
        f"{name}@alpha={alpha:g}": round(100 * value, 2)
        for alpha, metrics in zip(alphas, found, strict=True)
        for name, value in metrics.items()
    }


def _classification(
    base: Base,
    adapters: Adapters,
    val: LabelledImages,
    alphas: list[float],
    share: dict[str, Any],
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Zero-shot accuracy for each α, in one pass over the images; each class of an image is
    right.
    """
    classifiers, hits, total = [], [0] * len(alphas), 0
    for alpha in alphas:
        adapters.alpha = alpha
        classifiers.append(
            zero_shot_classifier(base.model, base.tokenizer, val.classes, val.templates)
        )

    def read(row: Any) -> tuple[Image.Image, NDArray[np.bool_]]:
        return val.image(row), np.isin(np.arange(len(val.classes)), val.labels_of(row))

    for batch in evaluation_batches(base, val.rows, read, **share):
        total += len(batch[1])
        for index, alpha in enumerate(alphas):
            adapters.alpha = alpha
            hits[index] += count_hits(base.model, classifiers[index], [batch])[0]
    *hits, total = accelerator.reduce(
        torch.tensor([*hits, total], device=accelerator.device)
    ).tolist()
    return [{"acc1": count / max(total, 1)} for count in hits]


@torch.no_grad()
def _retrieval(
    base: Base, adapters: Adapters, val: Captioned, alphas: list[float], share: dict[str, Any]
) -> list[dict[str, float]]:
    """Recall at 1 for each α, over all images and captions; a broken image takes its captions
    along.
    """
    device = next(base.model.parameters()).device

    def at_each_alpha(encode: Callable[[Any, Tensor], Tensor], inputs: Tensor) -> list[Tensor]:
        embeds = []
        for alpha in alphas:
            adapters.alpha = alpha
            embeds.append(encode(base.model, inputs.to(device)).cpu())
        return embeds

    texts = [
        (caption, number) for number, image in enumerate(val.images) for caption in image.captions
    ]
    images, captions = [], []  # pairs of numbers and, for each α, embeddings
    for pixels, numbers in evaluation_batches(
        base,
        range(len(val.images)),
        lambda number: (val.image(val.table[val.images[number].row]), number),
        **share,
    ):
        images.append((numbers.numpy(), at_each_alpha(encode_image, pixels)))
    if mine := range(share["rank"], len(texts), share["world"]):
        tokens = base.tokenizer([texts[index][0] for index in mine])
        captions.append((np.array(mine), at_each_alpha(encode_texts, tokens)))
    images, captions = gather_object(images), gather_object(captions)
    if not images:
        return [{} for _ in alphas]
    read = np.concatenate([numbers for numbers, _ in images])
    place = np.full(len(val.images), -1)
    place[np.sort(read)] = np.arange(len(read))
    told = np.concatenate([numbers for numbers, _ in captions])
    image_of = place[[number for _, number in texts]]
    kept = image_of >= 0
    groups = caption_groups(
        [caption for (caption, _), here in zip(texts, kept, strict=True) if here]
    )
    results = []
    for index in range(len(alphas)):
        image_embeds = np.concatenate([embeds[index] for _, embeds in images])[np.argsort(read)]
        text_embeds = np.concatenate([embeds[index] for _, embeds in captions])[np.argsort(told)]
        results.append(
            retrieval_metrics(image_embeds, text_embeds[kept], image_of[kept], (1,), groups)
        )
    return results
