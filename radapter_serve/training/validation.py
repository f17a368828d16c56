"""Validation during training: each task's metric at the recipe's α and at 1, over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parametrize

from radapter_serve.clip.towers import (
    encode_image,
    encode_texts,
    normalised,
    zero_shot_classifier,
)
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.data.captions import Captioned
from radapter_serve.data.rows import BrokenImage, LabelledImages
from radapter_serve.evaluation.metrics import (
    caption_groups,
    check_finite,
    recalls_of,
    retrieval_ranks,
)
from radapter_serve.training.setup import Learner

_BATCH = 64


def validate(learner: Learner) -> dict[str, float]:
    """Measure the adapters at the recipe's α and at 1, and leave them at 1;
    every process calls it.
    """
    alphas = sorted({learner.plan.recipe.alpha, 1.0})
    if isinstance(learner.val, Captioned):
        measured = _recalls(learner, learner.val, alphas)
    else:
        assert learner.val is not None
        right = answers(learner, learner.val, alphas)
        measured = [{"acc1": float(row.mean()) if row.size else 0.0} for row in right]
    return {
        f"{name}@alpha={alpha:g}": round(value, 4)
        for alpha, metrics in zip(alphas, measured, strict=True)
        for name, value in metrics.items()
    }


@torch.no_grad()
def answers(learner: Learner, val: LabelledImages, alphas: Sequence[float]) -> NDArray[np.bool_]:
    """Classify images at A values of α in one pass: whether the best class is right, bool [A, N];
    every process calls it.
    """
    base = learner.base
    classifiers = []
    for alpha in alphas:
        learner.adapters.alpha = alpha
        classifiers.append(
            zero_shot_classifier(base.model, base.tokenizer, val.classes, val.templates)
        )
    batches = []
    for rows, embeds in _embedded(learner, val, alphas):
        scores = torch.stack(
            [images @ texts.T for images, texts in zip(embeds, classifiers, strict=True)]
        )
        check_finite(scores.cpu().numpy())
        best = scores.argmax(dim=-1).cpu().numpy()
        right = [np.isin(best[:, n], val.labels_of(row)) for n, (_, row) in enumerate(rows)]
        batches.append(np.stack(right, axis=1))
    return np.concatenate(gather_object(batches) or [np.zeros((len(alphas), 0), bool)], axis=1)


@torch.no_grad()
def _recalls(learner: Learner, val: Captioned, alphas: Sequence[float]) -> list[dict[str, float]]:
    """Recall at 1 for each α, over all images that can be read and their captions."""
    parts = [
        ([number for number, _ in rows], torch.stack(embeds, dim=1).cpu().numpy())
        for rows, embeds in _embedded(learner, val, alphas)
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
    tokens = learner.base.tokenizer(texts)
    recalls = []
    for alpha, of_alpha in zip(alphas, images, strict=True):
        learner.adapters.alpha = alpha
        of_texts = encode_texts(learner.base.model, tokens).cpu().numpy()
        recalls.append(recalls_of(retrieval_ranks(of_alpha, of_texts, image_of, groups), (1,)))
    learner.adapters.alpha = 1.0
    return recalls


def _embedded(
    learner: Learner, val: LabelledImages | Captioned, alphas: Sequence[float]
) -> Iterator[tuple[list[tuple[int, Any]], list[Tensor]]]:
    """Yield batches of this process's images: numbers and rows, and embeddings at each α, [B, D]; α
    is 1 at the end.
    """
    model = learner.base.model
    device = next(model.parameters()).device
    preprocess = Preprocess.from_dict(learner.base.preprocess)
    images = val.image_rows
    accelerator = learner.accelerator
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    for first in range(0, len(mine), _BATCH):
        rows = []
        pixels = []
        for number in mine[first : first + _BATCH]:
            row = images[number]
            try:
                pixels.append(preprocess(val.image(row)))
                rows.append((number, row))
            except BrokenImage:
                if learner.examples.refuse:
                    raise
        if not rows:
            continue
        batch = normalised(np.stack(pixels), learner.base.preprocess, device)
        embeds = []
        for alpha in alphas:
            learner.adapters.alpha = alpha
            with parametrize.cached():
                embeds.append(encode_image(model, batch))
        yield rows, embeds
    learner.adapters.alpha = 1.0
