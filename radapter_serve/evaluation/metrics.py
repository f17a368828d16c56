"""Metrics from ranks: how many wrong answers stand before the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ranks = NDArray[np.int64]

RECALLS = (1, 5, 10)
_BLOCK = 1024  # rows of similarities in memory at once


def true_ranks(scores: Floats, truth: NDArray[Any]) -> Ranks:
    """Where the right answer stands in each row, 0 the best; of equal scores the earlier column stands first.

    Args:
        scores: [N, C].
        truth: the right column of each row, integer [N].

    Returns:
        int64 [N].
    """
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    return np.asarray(((scores > own) | ((scores == own) & earlier)).sum(axis=1), np.int64)


def classification_metrics(ranks: Ranks, labels: NDArray[Any], classes: int) -> dict[str, float]:
    """Accuracy from the ranks of the right classes.

    Args:
        ranks: from `true_ranks`, [N].
        labels: [N].
        classes: how many there are to choose from.

    Returns:
        Shares in [0, 1]: `acc1`, `acc5` where there are more than five classes, and `mean_per_class_recall` over the
        classes that have images.
    """
    hits = ranks < 1
    count = np.bincount(labels, minlength=classes)
    recall = np.bincount(labels, weights=hits, minlength=classes)[count > 0] / count[count > 0]
    metrics = {"acc1": float(hits.mean()), "mean_per_class_recall": float(recall.mean())}
    if classes > 5:
        metrics["acc5"] = float((ranks < 5).mean())
    return metrics


def retrieval_metrics(
    images: Floats, texts: Floats, image_of: NDArray[Any], recalls: Sequence[int] = RECALLS
) -> dict[str, float]:
    """Recall at k both ways, a hit being at least one true match among the best k.

    Args:
        images: unit length, [I, D].
        texts: unit length, [T, D]; each image has at least one.
        image_of: the image that each text belongs to, integer [T].
        recalls: values of k.

    Returns:
        Shares in [0, 1]: `image_retrieval_recall@k`, over the texts, each of which looks for its image, and
        `text_retrieval_recall@k`, over the images, each of which looks for any of its texts.
    """
    own = np.split(np.argsort(image_of, kind="stable"), np.cumsum(np.bincount(image_of, minlength=len(images)))[:-1])
    to_image = [
        true_ranks(texts[start : start + _BLOCK] @ images.T, image_of[start : start + _BLOCK])
        for start in range(0, len(texts), _BLOCK)
    ]
    to_text = []
    for start in range(0, len(images), _BLOCK):
        scores = images[start : start + _BLOCK] @ texts.T
        # of an image's own texts the best is looked for: the others only stand behind it
        best = [own[start + row][values[own[start + row]].argmax()] for row, values in enumerate(scores)]
        to_text.append(true_ranks(scores, np.array(best)))
    ways = {"image": np.concatenate(to_image), "text": np.concatenate(to_text)}
    return {f"{way}_retrieval_recall@{k}": float((ranks < k).mean()) for k in recalls for way, ranks in ways.items()}


def confusion(truth: NDArray[Any], found: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Counts of pixels, or whatever else has classes, by true and found class.

    Args:
        truth: integer [N], from 0 to classes - 1.
        found: integer [N], from 0 to classes; `classes` stands for none of them.
        classes: how many there are.

    Returns:
        int64 [classes, classes + 1].
    """
    pairs = truth.astype(np.int64) * (classes + 1) + found
    return np.bincount(pairs.ravel(), minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def segmentation_metrics(counts: NDArray[np.int64]) -> dict[str, float]:
    """Metrics of a whole data set from its pixels.

    Args:
        counts: from `confusion`, summed over the images.

    Returns:
        Shares in [0, 1]: `miou`, the mean of intersection over union over the classes that the truth or the answers
        have anywhere in the set; `pixel_accuracy`; `mean_class_accuracy` over the classes that the truth has.
    """
    classes = len(counts)
    hits, true, found = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)[:classes]
    union = true + found - hits
    return {
        "miou": float((hits[union > 0] / union[union > 0]).mean()) if union.any() else 0.0,
        "pixel_accuracy": float(hits.sum() / max(1, true.sum())),
        "mean_class_accuracy": float((hits[true > 0] / true[true > 0]).mean()) if true.any() else 0.0,
    }
