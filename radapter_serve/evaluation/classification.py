"""Zero-shot classification in torch: a classifier from class names, batches of images, and
accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor, nn

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import encode_image, encode_texts
from radapter_serve.contract.labels import mean_embeddings
from radapter_serve.data.rows import BrokenImage
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import NOT_FINITE

Tokenizer = Callable[[list[str]], Tensor]


@torch.no_grad()
def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Unit-length text embeddings of classes, float32 [C, D] on the model's device: the mean over a
    class's names, synonyms after commas, and all templates.
    """

    def embed(texts: list[str]) -> NDArray[np.float32]:
        return np.asarray(encode_texts(model, tokenizer(texts)).cpu())

    embeds = mean_embeddings(embed, classes, templates)
    return torch.from_numpy(embeds).to(next(model.parameters()).device)


@torch.no_grad()
def linear_head(classifier: Tensor, scale: float) -> nn.Linear:
    """A head that gives images the logits of zero-shot classification, to learn from there: from
    `zero_shot_classifier`, [C, D], and the model's 1/τ.
    """
    head = nn.Linear(classifier.shape[1], classifier.shape[0])
    head.weight.copy_(scale * classifier)
    head.bias.zero_()
    return head


@torch.no_grad()
def best_classes(model: nn.Module, classifier: Tensor, pixels: Tensor) -> Tensor:
    """The class that fits each image of [B, 3, S, S] best, integer [B], on the CPU; embeddings that
    are not finite are an error.
    """
    scores = encode_image(model, pixels.to(classifier.device)) @ classifier.T
    if not scores.isfinite().all():
        raise RAdapterError(NOT_FINITE)
    return scores.argmax(dim=1).cpu()


def evaluation_batches(
    base: Base,
    rows: Sequence[Any],
    read: Callable[[Any], tuple[Image, int | NDArray[np.bool_]]],
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
