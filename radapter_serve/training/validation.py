"""Validation during training: each task's metric at the recipe's α and at 1, over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.nn.utils import parametrize

from radapter_serve.adapter import Adapters
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_texts, zero_shot_classifier
from radapter_serve.data.captions import Captioned
from radapter_serve.data.rows import BrokenImage, LabelledImages
from radapter_serve.evaluation.metrics import (
    caption_groups,
    check_finite,
    recalls_of,
    retrieval_ranks,
)
from radapter_serve.training.recipe import Recipe

_BATCH = 64


def validate(
    base: Base,
    adapters: Adapters,
    val: LabelledImages | Captioned,
    recipe: Recipe,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Measure the adapters at the recipe's α and at 1, and leave them at 1. Returns fractions by
    metric and α: zero-shot accuracy or, for captions, recall at 1 both ways. Every process calls
    it.
    """
    alphas = sorted({recipe.alpha, 1.0})
    if isinstance(val, Captioned):
        measured = _recalls(base, adapters, val, alphas, recipe, accelerator)
    else:
        _, right = answers(base, adapters, val, alphas, recipe, accelerator)
        measured = [{"acc1": float(row.mean()) if row.size else 0.0} for row in right]
    return {
        f"{name}@alpha={alpha:g}": round(value, 4)
        for alpha, metrics in zip(alphas, measured, strict=True)
        for name, value in metrics.items()
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
    """Classify images with the adapters at A values of α in one pass; every process calls it.

    Returns the class of the best score, integer [A, N], and whether the image has this class, bool
    [A, N]. The order of images is the same at each call.
    """
    classifiers = []
    for alpha in alphas:
        adapters.alpha = alpha
        classifiers.append(
            zero_shot_classifier(base.model, base.tokenizer, val.classes, val.templates)
        )
    parts = []
    for rows, embeds in _embedded(base, adapters, val, alphas, recipe, accelerator):
        scores = [images @ classes.T for images, classes in zip(embeds, classifiers, strict=True)]
        check_finite(torch.stack(scores).cpu().numpy())
        best = torch.stack([of_alpha.argmax(dim=1) for of_alpha in scores]).cpu().numpy()
        right = [np.isin(best[:, n], val.labels_of(row)) for n, (_, row) in enumerate(rows)]
        parts.append((best, np.stack(right, axis=1)))
    parts = gather_object(parts)
    if not parts:
        return np.zeros((len(alphas), 0), np.int64), np.zeros((len(alphas), 0), bool)
    classes, hits = (np.concatenate(of, axis=1) for of in zip(*parts, strict=True))
    return classes, hits


@torch.no_grad()
def _recalls(
    base: Base,
    adapters: Adapters,
    val: Captioned,
    alphas: Sequence[float],
    recipe: Recipe,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Recall at 1 for each α, over all images and captions; a broken image is left out with its
    captions.
    """
    parts = [
        ([number for number, _ in rows], torch.stack(embeds, dim=1).cpu().numpy())
        for rows, embeds in _embedded(base, adapters, val, alphas, recipe, accelerator)
    ]
    embeds_of: dict[int, NDArray[np.float32]] = {}
    for numbers, embeds in gather_object(parts):
        embeds_of.update(zip(numbers, embeds, strict=True))
    if not embeds_of:
        return [{} for _ in alphas]
    kept = sorted(embeds_of)
    images = np.stack([embeds_of[number] for number in kept], axis=1)
    captions = [val.images[number].captions for number in kept]
    image_of = np.repeat(np.arange(len(kept)), [len(texts) for texts in captions])
    texts = [text for of_image in captions for text in of_image]
    groups = caption_groups(texts)
    tokens = base.tokenizer(texts)
    recalls = []
    for alpha, of_alpha in zip(alphas, images, strict=True):
        adapters.alpha = alpha
        of_texts = encode_texts(base.model, tokens).cpu().numpy()
        recalls.append(recalls_of(retrieval_ranks(of_alpha, of_texts, image_of, groups), (1,)))
    adapters.alpha = 1.0
    return recalls


def _embedded(
    base: Base,
    adapters: Adapters,
    val: LabelledImages | Captioned,
    alphas: Sequence[float],
    recipe: Recipe,
    accelerator: Accelerator,
) -> Iterator[tuple[list[tuple[int, Any]], list[Tensor]]]:
    """Yield batches of this process's share of the images: their numbers and rows, and their
    embeddings at each α, [B, D]. Images that can't be read are left out if the recipe skips them. α
    is 1 at the end.
    """
    device = next(base.model.parameters()).device
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    count = len(val.images) if isinstance(val, Captioned) else len(val.rows)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    for first in range(0, len(mine), _BATCH):
        rows = []
        pixels = []
        for number in mine[first : first + _BATCH]:
            if isinstance(val, Captioned):
                row = val.table[val.images[number].row]
            else:
                row = val.rows[number]
            try:
                pixels.append(transform(val.image(row)))
                rows.append((number, row))
            except BrokenImage:
                if recipe.on_broken == "refuse":
                    raise
        if not rows:
            continue
        batch = torch.stack(pixels).to(device)
        embeds = []
        for alpha in alphas:
            adapters.alpha = alpha
            with parametrize.cached():
                embeds.append(encode_image(base.model, batch))
        yield rows, embeds
    adapters.alpha = 1.0
