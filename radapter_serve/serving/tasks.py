"""The tasks, without Triton: a batch of requests and two encoders in, an answer or an error for each request out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.serving.errors import INVALID_ARGUMENT, TaskError
from radapter_serve.serving.label_source import LabelSource, strings
from radapter_serve.serving.labels import (
    EncodeTokens,
    LabelEmbedder,
    LabelSet,
    check_length,
    embed_texts,
)
from radapter_serve.serving.preprocess import Preprocess, decode_into
from radapter_serve.serving.tokenizer import Tokenizer

EncodeImages = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
DEFAULT_TOP_K = 5


class EmbedImages:
    """Encoded images to embeddings.

    Args:
        release: the release's facts (`release.json`).
        encode_images: uint8 [B, S, S, 3] -> float32 [B, D] of unit length, B at most the release's max_batch_size.
        threads: how many images are decoded at once; Pillow gives the interpreter free while it works.
    """

    def __init__(self, release: Mapping[str, Any], encode_images: EncodeImages, *, threads: int = 2) -> None:
        self._preprocess = Preprocess.from_dict(release["preprocess"])
        self._encode, self._max_batch_size = encode_images, int(release["max_batch_size"])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def __call__(self, requests: Sequence[Sequence[bytes]]) -> list[NDArray[np.float32] | TaskError]:
        """Embed the images of several requests in as few encoder calls as possible.

        Args:
            requests: the images of each request.

        Returns:
            For each request float32 [B, D], or the error of its first bad image; it does not touch its neighbours.
        """
        images = [image for request in requests for image in request]
        pixels = np.empty((len(images), *self._preprocess.size, 3), np.uint8)

        def fill(index: int) -> TaskError | None:
            try:
                decode_into(images[index], self._preprocess, pixels[index])
            except TaskError as error:
                return error
            return None

        indices = range(len(images))
        errors = list(self._pool.map(fill, indices) if self._pool and len(images) > 1 else map(fill, indices))

        # Rows of a request with a bad image are left out, so `where` says where the others are in the encoder's output.
        bad = np.zeros(len(images), bool)
        results: list[Any] = []
        start = 0
        for request in requests:
            rows = slice(start, start + len(request))
            start += len(request)
            error = next(filter(None, errors[rows]), None)
            bad[rows] = error is not None
            results.append(np.arange(rows.start, rows.stop) if error is None else error)
        if bad.all():
            return results
        where = np.cumsum(~bad) - 1
        embeds = self._encode_all(pixels[~bad] if bad.any() else pixels)
        return [result if isinstance(result, TaskError) else embeds[where[result]] for result in results]

    def _encode_all(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        step = self._max_batch_size
        parts = [self._encode(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class EmbedTexts:
    """Texts to embeddings.

    Args:
        release: the release's facts.
        tokenizer: the release's tokenizer.
        encode_tokens: int32 [B, L] -> float32 [B, D] of unit length.
    """

    def __init__(self, release: Mapping[str, Any], tokenizer: Tokenizer, encode_tokens: EncodeTokens) -> None:
        self._tokenizer, self._encode = tokenizer, encode_tokens
        self._max_batch_size = int(release["max_batch_size"])

    def __call__(self, requests: Sequence[Sequence[bytes]]) -> list[NDArray[np.float32] | TaskError]:
        """Embed the texts (UTF-8) of several requests; for each float32 [B, D] or its error."""
        texts: list[list[str] | TaskError] = [_caught(_texts, request) for request in requests]
        unique = list(dict.fromkeys(text for some in texts if not isinstance(some, TaskError) for text in some))
        embeds = embed_texts(unique, self._tokenizer, self._encode, self._max_batch_size)
        where = {text: row for row, text in enumerate(unique)}
        return [some if isinstance(some, TaskError) else embeds[[where[text] for text in some]] for some in texts]


@dataclass
class ClassifyRequest:
    """One request of `classify`; every list has one entry per image (B of them).

    Args:
        images: encoded images.
        labels: labels of each image, or None.
        label_set: name of a label set for each image, or None.
        templates: prompt templates for `labels`, or None for the release's.
        top_k: number of labels to give back, or None for 5.
        cancelled: whether the caller has given up; None where that is unknown.
    """

    images: Sequence[bytes]
    labels: Sequence[Sequence[bytes]] | None = None
    label_set: Sequence[bytes] | None = None
    templates: Sequence[Sequence[bytes]] | None = None
    top_k: Sequence[int] | None = None
    cancelled: Callable[[], bool] | None = None


@dataclass
class Classes:
    """The answer: labels, object [B, k] of str, and their scores, float32 [B, k], best first."""

    labels: NDArray[np.object_]
    scores: NDArray[np.float32]


class Classify:
    """Zero-shot classification.

    Args:
        release: the release's facts.
        embed_images: the task that embeds.
        embed_labels: embeds the labels a request brings.
        label_sets: the release's label sets by name.
    """

    def __init__(
        self,
        release: Mapping[str, Any],
        embed_images: EmbedImages,
        embed_labels: LabelEmbedder,
        label_sets: Mapping[str, LabelSet],
    ) -> None:
        self._embed_images = embed_images
        self._label_source = LabelSource(release["templates"], embed_labels, label_sets)
        self._scale, self._bias = float(release["logit_scale"]), release.get("logit_bias")

    def __call__(self, requests: Sequence[ClassifyRequest]) -> list[Classes | TaskError]:
        """Classify the images of several requests: all images together, each request against its own labels.

        Returns:
            For each request its classes, or its error; bad labels are refused before any image is encoded.
        """
        plans = [_caught(self._plan, request) for request in requests]
        wanted = [index for index, plan in enumerate(plans) if not isinstance(plan, TaskError)]
        results: list[Any] = list(plans)
        for index, embeds in zip(wanted, self._embed_images([requests[i].images for i in wanted]), strict=True):
            results[index] = embeds if isinstance(embeds, TaskError) else self._score(embeds, *plans[index])
        return results

    def _plan(self, request: ClassifyRequest) -> tuple[list[LabelSet], int]:
        """The label set of each image, and how many labels to give back."""
        top_k = [DEFAULT_TOP_K] if request.top_k is None else [int(k) for k in request.top_k]
        if min(top_k) < 1 or len(set(top_k)) > 1:
            raise TaskError(INVALID_ARGUMENT, f"top_k is {top_k}; one whole number from 1 for all images of a request")
        sets = self._label_source(request.labels, request.label_set, request.templates, request.cancelled)
        return sets, min(top_k[0], *(len(label_set.labels) for label_set in sets))

    def _score(self, embeds: NDArray[np.float32], sets: list[LabelSet], k: int) -> Classes:
        labels, scores = np.empty((len(sets), k), object), np.empty((len(sets), k), np.float32)
        if all(label_set is sets[0] for label_set in sets):
            cosines = list(embeds @ sets[0].embeds.T)
        else:
            cosines = [label_set.embeds @ embed for label_set, embed in zip(sets, embeds, strict=True)]
        for row, (cosine, label_set) in enumerate(zip(cosines, sets, strict=True)):
            probabilities = self._probabilities(self._scale * cosine)
            best = np.argpartition(-probabilities, k - 1)[:k]
            best = best[np.lexsort((best, -probabilities[best]))]
            labels[row] = [label_set.labels[index] for index in best]
            scores[row] = probabilities[best]
        return Classes(labels, scores)

    def _probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Softmax over the labels; for a model trained with a sigmoid loss (it has a bias), each label's sigmoid."""
        if self._bias is not None:
            return np.asarray(1 / (1 + np.exp(-np.clip(logits + self._bias, -80, 80))), np.float32)
        exponents = np.exp(logits - logits.max())
        return np.asarray(exponents / exponents.sum(), np.float32)


def load_label_sets(folder: str | Path) -> dict[str, LabelSet]:
    """All `NAME.npz` of a folder by name; none if there is no such folder."""
    return {path.stem: LabelSet.load(path) for path in sorted(Path(folder).glob("*.npz"))}


def _texts(request: Sequence[bytes]) -> list[str]:
    texts = list(strings(*request))
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise TaskError(INVALID_ARGUMENT, f"text {number} of {len(texts)} is empty; give at least one word")
        check_length(text)
    return texts


def _caught(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except TaskError as error:
        return error
