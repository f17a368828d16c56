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
from radapter_serve.data.rows import BrokenImage
from radapter_serve.evaluation.metrics import (
    caption_groups,
    check_finite,
    recalls_of,
    retrieval_ranks,
)
from radapter_serve.training.setup import Learner

_BATCH = 64


@torch.no_grad()
def validate(learner: Learner) -> dict[str, float]:
    """Measure the average of the adapters at the recipe's α and at 1; empty without validation
    data. Every process calls it.
    """
    val = learner.val
    if val is None:
        return {}
    base = learner.base
    adapters = learner.adapters
    alphas = sorted({learner.recipe.alpha, 1.0})
    metrics: dict[str, float] = {}
    with learner.average.applied():
        # Embed this process's images; of images with labels, keep whether the best class is right.
        classifiers = []
        if not isinstance(val, Captioned):
            for alpha in alphas:
                adapters.alpha = alpha
                classes = (val.classes, val.templates)
                classifiers.append(zero_shot_classifier(base.model, base.tokenizer, *classes))
        answers: dict[int, NDArray[Any]] = {}
        for rows, embeds in _embedded(learner, alphas):
            answer = embeds.cpu().numpy()
            if not isinstance(val, Captioned):
                scores = embeds @ torch.stack(classifiers).mT
                check_finite(scores.cpu().numpy())
                best = scores.argmax(dim=-1).cpu().numpy()
                labels = [val.labels_of(row) for row in rows.values()]
                answer = np.stack([np.isin(best[:, n], of) for n, of in enumerate(labels)], axis=1)
            answers.update(zip(rows, answer.swapaxes(0, 1), strict=True))

        # Gather the answers of all processes, in the order of the images, and measure each α.
        for others in gather_object([answers]):
            answers |= others
        numbers = sorted(answers)
        for place, alpha in enumerate(alphas if numbers else ()):
            adapters.alpha = alpha
            of_alpha = np.stack([answers[number][place] for number in numbers])
            measured = {"acc1": float(of_alpha.mean())}
            if isinstance(val, Captioned):
                measured = _recalls(learner, of_alpha, [val.images[n].captions for n in numbers])
            metrics |= {f"{name}@alpha={alpha:g}": round(v, 4) for name, v in measured.items()}
    adapters.alpha = 1.0
    return metrics


def _recalls(
    learner: Learner, images: NDArray[np.float32], captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Recall at 1 of images [N, D] and their captions, both ways."""
    image_of = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    texts = [text for of_image in captions for text in of_image]
    model = learner.base.model
    of_texts = encode_texts(model, learner.base.tokenizer(texts)).cpu().numpy()
    return recalls_of(retrieval_ranks(images, of_texts, image_of, caption_groups(texts)), (1,))


def _embedded(learner: Learner, alphas: Sequence[float]) -> Iterator[tuple[dict[int, Any], Tensor]]:
    """Yield batches of this process's validation images: rows by number, and embeddings at each α,
    [A, B, D].
    """
    val = learner.val
    assert val is not None
    model = learner.base.model
    preprocess = Preprocess.from_dict(learner.base.preprocess)
    device = learner.accelerator.device
    world = learner.accelerator.num_processes
    images = val.image_rows
    mine = range(learner.accelerator.process_index, len(images), world)
    for first in range(0, len(mine), _BATCH):
        rows = {}
        pixels = []
        for number in mine[first : first + _BATCH]:
            row = images[number]
            try:
                pixels.append(preprocess(val.image(row)))
                rows[number] = row
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
        yield rows, torch.stack(embeds)
