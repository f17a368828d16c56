"""The tasks, without Triton: a batch of requests and two encoders in, an answer or an error for each request out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radapter_serve.files import as_text
from radapter_serve.inputs.alpha import Alpha, Encode
from radapter_serve.inputs.errors import Cancelled, TaskError, invalid
from radapter_serve.inputs.labels import check_length
from radapter_serve.inputs.preprocess import Preprocess, decode_into
from radapter_serve.inputs.tokenizer import Tokenizer, embed_texts
from radapter_serve.release.release import Release
from radapter_serve.tasks.label_embeddings import LabelEmbedder, LabelSet
from radapter_serve.tasks.label_source import LabelSource, strings
from radapter_serve.tasks.outcome import Outcome
from radapter_serve.tasks.scores import Scores, Scoring


class EmbedImages:
    """Encoded images to embeddings.

    Args:
        release: its facts.
        encode_images: uint8 [B, S, S, 3], with α where that is an input, -> float32 [B, D] of unit length; B at most
            the release's max_batch_size.
        threads: how many images are decoded at once; Pillow gives the interpreter free while it works.
    """

    def __init__(self, release: Release, encode_images: Encode, *, threads: int = 2) -> None:
        self._preprocess, self._request_alpha = Preprocess.from_dict(release.preprocess), release.request_alpha
        self._encode, self._max_batch_size = encode_images, release.max_batch_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def __call__(
        self, requests: Sequence[Sequence[bytes]], alphas: Sequence[ArrayLike | None] | None = None
    ) -> list[Outcome[NDArray[np.float32]]]:
        """Embed the images of several requests in as few encoder calls as possible.

        Args:
            requests: the images of each request.
            alphas: of each request what it brings: an α for each image, or None for the release's own.

        Returns:
            For each request float32 [B, D], or the error of its α or its first bad image.
        """
        images = [image for request in requests for image in request]
        pixels = np.empty((len(images), *self._preprocess.size, 3), np.uint8)

        def fill(index: int) -> Outcome[None]:
            return Outcome.of(lambda: decode_into(images[index], self._preprocess, pixels[index]))

        indices = range(len(images))
        decoded = list(self._pool.map(fill, indices) if self._pool and len(images) > 1 else map(fill, indices))

        def prepared(own: slice, given: ArrayLike | None) -> Alpha | None:
            alpha = self._request_alpha(given, own.stop - own.start)
            for number, outcome in enumerate(decoded[own], 1):
                if outcome.error is not None and len(decoded[own]) > 1:
                    where = f"image {number} of {len(decoded[own])}"
                    raise TaskError(outcome.error.code, f"{where}: {outcome.error.message}")
                outcome.unwrap()
            return alpha

        ends = itertools.accumulate(map(len, requests))
        rows = [slice(end - len(request), end) for request, end in zip(requests, ends, strict=True)]
        ready = [Outcome.of(partial(prepared, *one)) for one in zip(rows, _given(alphas, requests), strict=True)]
        good = [own for own, alpha in zip(rows, ready, strict=True) if alpha.error is None]
        if not good:
            return [Outcome(error=alpha.error) for alpha in ready]
        kept = pixels if len(good) == len(rows) else np.concatenate([pixels[own] for own in good])
        known = [alpha.answer for alpha in ready if alpha.answer is not None]  # none where α is no input
        embeds = self._encode_all(kept, *([np.concatenate(known)] if known else []))
        parts = iter(np.split(embeds, np.cumsum([own.stop - own.start for own in good])))
        return [alpha.then(lambda _: next(parts)) for alpha in ready]

    def _encode_all(self, *rows: NDArray[Any]) -> NDArray[np.float32]:
        step = self._max_batch_size
        starts = range(0, len(rows[0]), step)
        parts = [self._encode(*(each[start : start + step] for each in rows)) for start in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class EmbedTexts:
    """Texts to embeddings.

    Args:
        release: its facts.
        tokenizer: the release's tokenizer.
        encode_tokens: int32 [B, L], with α where that is an input, -> float32 [B, D] of unit length.
    """

    def __init__(self, release: Release, tokenizer: Tokenizer, encode_tokens: Encode) -> None:
        self._tokenizer, self._encode, self._request_alpha = tokenizer, encode_tokens, release.request_alpha
        self._max_batch_size = release.max_batch_size

    def __call__(
        self, requests: Sequence[Sequence[bytes]], alphas: Sequence[ArrayLike | None] | None = None
    ) -> list[Outcome[NDArray[np.float32]]]:
        """Embed the texts (UTF-8) of several requests; for each float32 [B, D] or its error.

        Args:
            requests: the texts of each request.
            alphas: as of `EmbedImages`.
        """

        def prepared(request: Sequence[bytes], given: ArrayLike | None) -> list[tuple[str, float | None]]:
            alpha, texts = self._request_alpha(given, len(request)), _texts(request)
            return list(zip(texts, [None] * len(texts) if alpha is None else alpha.ravel(), strict=True))

        ready = [Outcome.of(partial(prepared, *one)) for one in zip(requests, _given(alphas, requests), strict=True)]
        unique = list(dict.fromkeys(pair for some in ready for pair in some.answer or ()))
        rows = np.array([[alpha] for _, alpha in unique], np.float32) if self._request_alpha.dynamic else None
        names = [text for text, _ in unique]
        embeds = embed_texts(names, self._tokenizer, self._encode, self._max_batch_size, alpha=rows)
        where = {pair: row for row, pair in enumerate(unique)}
        return [some.then(lambda pairs: embeds[[where[pair] for pair in pairs]]) for some in ready]


@dataclass
class ClassifyRequest:
    """One request of `classify`; every list has one entry per image (B of them).

    Args:
        images: encoded images.
        labels: labels of each image, or None.
        label_set: name of a label set for each image, or None.
        templates: prompt templates for `labels`, or None for the release's.
        top_k: number of labels to give back, or None for 5, and for all with `multi_label`.
        alpha: of each image, or None for the release's own.
        multi_label: whether each label is scored by itself, so that several may be right, or none.
        threshold: score from which such labels are given back, or None for 0.5.
        calibrated: whether scores are as the release fitted them to validation data.
        cancelled: whether the caller has given up; None where that is unknown.
    """

    images: Sequence[bytes]
    labels: Sequence[Sequence[bytes]] | None = None
    label_set: Sequence[bytes] | None = None
    templates: Sequence[Sequence[bytes]] | None = None
    top_k: Sequence[int] | None = None
    alpha: ArrayLike | None = None
    multi_label: Sequence[bool] | None = None
    threshold: Sequence[float] | None = None
    calibrated: Sequence[bool] | None = None
    cancelled: Cancelled | None = None


@dataclass
class Classes:
    """The answer: labels, object [B, k] of str, and their scores, float32 [B, k], best first.

    An image with fewer labels above the threshold than another of its request has empty labels of score 0 at its end;
    k is at least 1.
    """

    labels: NDArray[np.object_]
    scores: NDArray[np.float32]


class Classify:
    """Zero-shot classification.

    Args:
        release: its facts.
        embed_images: the task that embeds.
        embed_labels: embeds the labels a request brings.
        label_sets: the release's label sets by name.
    """

    def __init__(
        self,
        release: Release,
        embed_images: EmbedImages,
        embed_labels: LabelEmbedder,
        label_sets: Mapping[str, LabelSet],
    ) -> None:
        self._embed_images = embed_images
        self._label_source, self._request_alpha = LabelSource(release, embed_labels, label_sets), release.request_alpha
        self._scoring = Scoring(release)

    def __call__(self, requests: Sequence[ClassifyRequest]) -> list[Outcome[Classes]]:
        """Classify the images of several requests: all images together, each request against its own labels.

        Returns:
            For each request its classes, or its error; bad labels are refused before any image is encoded.
        """
        plans = [Outcome.of(partial(self._plan, request)) for request in requests]
        good = [request for request, plan in zip(requests, plans, strict=True) if plan.error is None]
        embeds = iter(self._embed_images([one.images for one in good], [one.alpha for one in good]))
        return [plan.then(lambda own: self._score(next(embeds).unwrap(), *own)) for plan in plans]

    def _plan(self, request: ClassifyRequest) -> tuple[list[LabelSet], Scores]:
        """The label set of each image, and how its labels are scored."""
        alpha = self._request_alpha(request.alpha, len(request.images))
        scores = self._scoring(request.top_k, request.multi_label, request.threshold, request.calibrated, request.alpha)
        sets = self._label_source(request.labels, request.label_set, request.templates, alpha, request.cancelled)
        return sets, scores

    def _score(self, embeds: NDArray[np.float32], sets: list[LabelSet], wanted: Scores) -> Classes:
        if all(label_set is sets[0] for label_set in sets):
            cosines = list(embeds @ sets[0].embeds.T)
        else:
            cosines = [label_set.embeds @ embed for label_set, embed in zip(sets, embeds, strict=True)]
        found = [wanted.best(cosine) for cosine in cosines]
        # As wide as the image with most; but where all are to have as many labels, as many as each has.
        widths = [len(best) for best, _ in found]
        k = min(widths) if wanted.threshold is None else max(1, *widths)
        labels, scores = np.full((len(sets), k), "", object), np.zeros((len(sets), k), np.float32)
        for row, ((best, values), label_set) in enumerate(zip(found, sets, strict=True)):
            labels[row, : len(best)] = [label_set.labels[index] for index in best[:k]]
            scores[row, : len(best)] = values[:k]
        return Classes(labels, scores)


def load_label_sets(folder: str | Path) -> dict[str, LabelSet]:
    """All `NAME.npz` of a folder by name; none if there is no such folder."""
    return {as_text(path.stem): LabelSet.load(path) for path in sorted(Path(folder).glob("*.npz"))}


def _given(alphas: Sequence[ArrayLike | None] | None, requests: Sequence[Any]) -> Sequence[ArrayLike | None]:
    return [None] * len(requests) if alphas is None else alphas


def _texts(request: Sequence[bytes]) -> list[str]:
    texts = list(strings(*request))
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise invalid(f"text {number} of {len(texts)} is empty; give at least one word")
        check_length(text)
    return texts
