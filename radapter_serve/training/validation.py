"""Validation on the way: each task's measure at the recipe's α and at 1, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils import parametrize

from radapter_serve.adapter import Adapters
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_texts
from radapter_serve.data.captions import Captioned
from radapter_serve.data.rows import LabelledImages
from radapter_serve.evaluation.classification import (
    best_classes,
    evaluation_batches,
    zero_shot_classifier,
)
from radapter_serve.evaluation.metrics import caption_groups, recalls_of, retrieval_ranks
from radapter_serve.training.recipe import Recipe


def validate(
    base: Base,
    adapters: Adapters,
    val: LabelledImages | Captioned,
    recipe: Recipe,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Measure the adapters at the recipe's α and at 1, which stays: fractions by measure and α, of
    zero-shot accuracy, or of images with captions recall at 1 both ways. Every process calls it.
    """
    alphas = sorted({recipe.alpha, 1.0})
    if isinstance(val, Captioned):
        found = _retrieval(base, adapters, val, alphas, _share(recipe, accelerator))
    else:
        _, right = answers(base, adapters, val, alphas, recipe, accelerator)
        found = [{"acc1": float(row.mean()) if row.size else 0.0} for row in right]
    adapters.alpha = 1.0
    return {
        f"{name}@alpha={alpha:g}": round(value, 4)
        for alpha, metrics in zip(alphas, found, strict=True)
        for name, value in metrics.items()
    }


def _share(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """This process's share of the images, and what broken ones do."""
    return {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "broken": [] if recipe.on_broken == "skip" else None,
    }


@torch.no_grad()
def answers(
    base: Base,
    adapters: Adapters,
    val: LabelledImages,
    alphas: Sequence[float],
    recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What the adapters answer at A values of α, the last of which stays, in one pass over the
    images; every process calls it.

    Returns the class of the best score, integer [A, N], and whether it is right, bool [A, N]; each
    class of an image is. The order of the images is the same in each call.
    """
    classifiers = []
    for alpha in alphas:
        adapters.alpha = alpha
        classifiers.append(
            zero_shot_classifier(base.model, base.tokenizer, val.classes, val.templates)
        )

    def read(row: Any) -> tuple[Image.Image, NDArray[np.bool_]]:
        return val.image(row), np.isin(np.arange(len(val.classes)), val.labels_of(row))

    found: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
    for pixels, labels in evaluation_batches(base, val.rows, read, **_share(recipe, accelerator)):
        own = []
        for alpha, classifier in zip(alphas, classifiers, strict=True):
            adapters.alpha = alpha
            with parametrize.cached():
                own.append(best_classes(base.model, classifier, pixels).numpy())
        answered = np.stack(own)
        right = np.asarray(labels)[np.arange(len(labels)), answered]
        found.append((answered, right))
    of_all = gather_object(found)
    if not of_all:
        return np.zeros((len(alphas), 0), np.int64), np.zeros((len(alphas), 0), bool)
    answered, right = (np.concatenate(parts, axis=1) for parts in zip(*of_all, strict=True))
    return answered, right


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
    # pairs of numbers and, for each α, embeddings
    images = []
    captions = []
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
    images = gather_object(images)
    captions = gather_object(captions)
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
        ranks = retrieval_ranks(image_embeds, text_embeds[kept], image_of[kept], groups)
        results.append(recalls_of(ranks, (1,)))
    return results
