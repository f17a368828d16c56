"""Validation on the way: each task's measure at the recipe's α and at 1, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
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

_Part = tuple[NDArray[Any], NDArray[Any]]


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
        measured = _recalls(base, adapters, val, alphas, recipe, accelerator)
    else:
        _, right = answers(base, adapters, val, alphas, recipe, accelerator)
        measured = [{"acc1": float(row.mean()) if row.size else 0.0} for row in right]
    adapters.alpha = 1.0
    return {
        f"{name}@alpha={alpha:g}": round(value, 4)
        for alpha, metrics in zip(alphas, measured, strict=True)
        for name, value in metrics.items()
    }


def _part(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """How `evaluation_batches` gives this process its part of the images."""
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

    batches: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
    for pixels, labels in evaluation_batches(base, val.rows, read, **_part(recipe, accelerator)):
        best = []
        for alpha, classifier in zip(alphas, classifiers, strict=True):
            adapters.alpha = alpha
            with parametrize.cached():
                best.append(best_classes(base.model, classifier, pixels).numpy())
        classes = np.stack(best)
        batches.append((classes, np.asarray(labels)[np.arange(len(labels)), classes]))
    batches = gather_object(batches)
    if not batches:
        return np.zeros((len(alphas), 0), np.int64), np.zeros((len(alphas), 0), bool)
    classes, right = (np.concatenate(parts, axis=1) for parts in zip(*batches, strict=True))
    return classes, right


@torch.no_grad()
def _recalls(
    base: Base,
    adapters: Adapters,
    val: Captioned,
    alphas: Sequence[float],
    recipe: Recipe,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Recall at 1 for each α, over all images and captions; a broken image takes its captions
    along.
    """
    device = next(base.model.parameters()).device
    texts = [
        (caption, number) for number, image in enumerate(val.images) for caption in image.captions
    ]

    # Embed this process's part at each α: pairs of numbers and embeddings [A, N, D].
    image_parts = []
    text_parts = []
    for pixels, numbers in evaluation_batches(
        base,
        range(len(val.images)),
        lambda number: (val.image(val.table[val.images[number].row]), number),
        **_part(recipe, accelerator),
    ):
        embeds = []
        for alpha in alphas:
            adapters.alpha = alpha
            embeds.append(encode_image(base.model, pixels.to(device)).cpu().numpy())
        image_parts.append((numbers.numpy(), np.stack(embeds)))
    if mine := range(accelerator.process_index, len(texts), accelerator.num_processes):
        tokens = base.tokenizer([texts[index][0] for index in mine]).to(device)
        embeds = []
        for alpha in alphas:
            adapters.alpha = alpha
            embeds.append(encode_texts(base.model, tokens).cpu().numpy())
        text_parts.append((np.array(mine), np.stack(embeds)))
    image_parts = gather_object(image_parts)
    text_parts = gather_object(text_parts)
    if not image_parts:
        return [{} for _ in alphas]

    # Put those of all processes in their order, without the captions of broken images.
    images_read, image_embeds = _joined(image_parts)
    _, text_embeds = _joined(text_parts)
    place = np.full(len(val.images), -1)
    place[images_read] = np.arange(len(images_read))
    image_of = place[[number for _, number in texts]]
    kept = image_of >= 0
    groups = caption_groups([texts[index][0] for index in np.flatnonzero(kept)])
    recalls = []
    for images, captions in zip(image_embeds, text_embeds, strict=True):
        ranks = retrieval_ranks(images, captions[kept], image_of[kept], groups)
        recalls.append(recalls_of(ranks, (1,)))
    return recalls


def _joined(parts: Sequence[_Part]) -> _Part:
    """Numbers [N] in their order, and embeddings [A, N, D] in the same."""
    numbers = np.concatenate([of for of, _ in parts])
    order = np.argsort(numbers)
    return numbers[order], np.concatenate([embeds for _, embeds in parts], axis=1)[:, order]


@torch.no_grad()
def best_classes(model: nn.Module, classifier: Tensor, pixels: Tensor) -> Tensor:
    """The class that fits each image of [B, 3, S, S] best, integer [B], on the CPU; embeddings that
    are not finite are an error.
    """
    scores = encode_image(model, pixels.to(classifier.device)) @ classifier.T
    check_finite(scores.cpu().numpy())
    return scores.argmax(dim=1).cpu()


def evaluation_batches(
    base: Base,
    rows: Sequence[Any],
    read: Callable[[Any], tuple[Image.Image, int | NDArray[np.bool_]]],
    batch_size: int = 64,
    *,
    rank: int = 0,
    world: int = 1,
    broken: list[str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pixels, as open_clip's own transform makes them for a base, and labels of images.

    `read` gives the image of a row and its label, or for every class whether it is one of the
    labels. Each of `world` processes gets its share. Images that can't be read are left out and
    named in `broken`; None raises BrokenImage.
    """
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    mine = range(rank, len(rows), world)
    for first in range(0, len(mine), batch_size):
        pixels = []
        labels = []
        for index in mine[first : first + batch_size]:
            try:
                image, label = read(rows[index])
                pixels.append(transform(image))
                labels.append(label)
            except BrokenImage as error:
                if broken is None:
                    raise
                broken.append(str(error))
        if pixels:
            yield torch.stack(pixels), torch.from_numpy(np.array(labels))  # type: ignore[arg-type]
