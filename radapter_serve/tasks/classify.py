"""The tasks, without Triton: a batch of requests and two encoders in, an answer or an error for
each request out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radapter_serve.contract.alpha import Alpha, Encode, RequestAlpha, each
from radapter_serve.contract.errors import Cancelled, TaskError, invalid
from radapter_serve.contract.labels import check_length
from radapter_serve.contract.preprocess import (
    ImageFile,
    Preprocess,
    check_request,
    decode_into,
    read_headers,
)
from radapter_serve.contract.tokenizer import Tokenizer, embed_texts
from radapter_serve.files import as_text
from radapter_serve.release.release import Release
from radapter_serve.tasks.examples import (
    ByExample,
    ImageRows,
    check_encoded,
    check_places,
    read_examples,
    read_shown,
)
from radapter_serve.tasks.label_embeddings import Examples, LabelEmbedder, LabelSet
from radapter_serve.tasks.label_source import LabelSource, strings
from radapter_serve.tasks.outcome import Outcome, run_good
from radapter_serve.tasks.scored_mask import finite
from radapter_serve.tasks.scores import UNKNOWN, Scores, Scoring

T = TypeVar("T")

# Images that the encoder takes at once while the next are decoded. On a CPU more are slower: what
# lies between the layers no longer fits in its cache.
CHUNK = 16


class EmbedImages:
    """Encoded images to embeddings.

    Args:
        release: its facts.
        encode_images: uint8 [B, S, S, 3], with α where that is an input, -> float32 [B, D] of unit
            length; B at most the release's max_batch_size.
        threads: how many images are decoded at once; Pillow gives the interpreter free while it
            works.
    """

    def __init__(self, release: Release, encode_images: Encode, *, threads: int = 2) -> None:
        self._preprocess = Preprocess.from_dict(release.preprocess)
        self._request_alpha = release.request_alpha
        self._encode = encode_images
        self._max_batch_size = release.max_batch_size
        self._threads = threads
        self._pool = (
            ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
        )

    def __call__(
        self,
        requests: Sequence[Sequence[bytes | ImageFile]],
        alphas: Sequence[ArrayLike | None] | None = None,
        cancelled: Sequence[Cancelled | None] | None = None,
    ) -> list[Outcome[NDArray[np.float32]]]:
        """Embed the images of several requests together.

        Args:
            requests: the images of each request.
            alphas: of each request what it brings: an α for each image, or None for the release's
                own.
            cancelled: of each request whether its caller has given up, or None.

        Returns:
            For each request float32 [B, D], or the error of its α or its first bad image.
        """
        asks = [None] * len(requests) if cancelled is None else cancelled
        checked = _with_alphas(requests, alphas, self._request_alpha)
        rows = [one.then(partial(_rows_of, ask)) for one, ask in zip(checked, asks, strict=True)]
        return run_good(rows, self.at)

    def read(self, rows: ImageRows) -> ImageRows:
        """The same with the headers of its images.

        Raises:
            TaskError: of the first bad image; too many pixels.
        """
        files = read_headers(rows.images)
        for file in files:
            self._preprocess.check(file.width, file.height)
        return replace(rows, images=files)

    def at(self, requests: Sequence[ImageRows]) -> list[Outcome[NDArray[np.float32]]]:
        """Embed the images of several requests at an α that is checked.

        Before an image is decoded, the headers of all are read; before each, its caller is asked.

        Args:
            requests: the images of each request, and their α as `RequestAlpha` gives it.

        Returns:
            For each request float32 [B, D], or the error of its first bad image.
        """
        return run_good([Outcome.of(partial(self.read, one)) for one in requests], self._embed)

    def close(self) -> None:
        """End the threads that decode."""
        if self._pool is not None:
            self._pool.shutdown()

    def _embed(self, requests: Sequence[ImageRows]) -> list[Outcome[NDArray[np.float32]]]:
        images = [(image, one.cancelled) for one in requests for image in one.images]
        counts = [len(one.images) for one in requests]
        owners = np.repeat(np.arange(len(requests)), counts)
        known = [one.alpha for one in requests if one.alpha is not None]  # none where α is no input
        rows = np.concatenate(known) if known else None
        pixels = np.empty((len(images), *self._preprocess.size, 3), np.uint8)
        decoded: list[Outcome[None]] = []
        good = np.ones(len(requests), bool)
        encoded: list[int] = []
        parts: list[NDArray[np.float32]] = []
        with contextlib.closing(self._decode(images, pixels)) as decoding:
            for chunk in self._chunks(len(images)):
                found = list(itertools.islice(decoding, len(chunk)))
                decoded += found
                broken = [row for row, one in zip(chunk, found, strict=True) if one.error]
                good[owners[broken]] = False
                chosen = [row for row in chunk if good[owners[row]]]
                if chosen:
                    inputs = [pixels[chosen]] if rows is None else [pixels[chosen], rows[chosen]]
                    parts.append(self._encode(*inputs))
                    encoded += chosen
        embeds = np.empty((len(images), parts[0].shape[1] if parts else 0), np.float32)
        if parts:
            embeds[encoded] = np.concatenate(parts)
        ends = list(itertools.accumulate(counts))
        results: list[Outcome[NDArray[np.float32]]] = []
        for count, end in zip(counts, ends, strict=True):
            error = _first_error(decoded[end - count : end])
            own = embeds[end - count : end]
            results.append(Outcome(own) if error is None else Outcome(error=error))
        return results

    def _decode(
        self,
        images: Sequence[tuple[bytes | ImageFile, Cancelled | None]],
        pixels: NDArray[np.uint8],
    ) -> Generator[Outcome[None]]:
        """Decode images into their `pixels`, [N, S, S, 3], and say what became of each, in their
        order; the pixels of bad ones mean nothing.

        The threads take the small ones, all from now on. A large one, which may wait for others, is
        decoded by this thread, so that it keeps no thread from the images of other callers.
        """

        def fill(index: int) -> Outcome[None]:
            file, cancelled = images[index]
            work = partial(decode_into, file, self._preprocess, pixels[index], cancelled)
            return Outcome.of(work)

        pool = self._pool
        results: dict[int, Future[Outcome[None]]] = {}
        if pool is not None and len(images) > 1:
            for index, (file, _) in enumerate(images):
                if not (isinstance(file, ImageFile) and file.is_large):
                    results[index] = Future()
        todo = deque(results)

        def take() -> None:
            with contextlib.suppress(IndexError):  # another thread took the last, or nobody waits
                index = todo.popleft()
                results[index].set_result(fill(index))
            # Behind the images of other callers, so that all have turns.
            if todo:
                self._submit(take)

        for _ in range(min(self._threads, len(todo))):
            self._submit(take)

        def found() -> Generator[Outcome[None]]:
            try:
                for index in range(len(images)):
                    yield results[index].result() if index in results else fill(index)
            finally:
                todo.clear()

        return found()

    def _submit(self, work: Callable[[], None]) -> None:
        assert self._pool is not None
        try:
            self._pool.submit(work)
        except RuntimeError:  # the release is closed, and what is under way ends as it began
            work()

    def _chunks(self, count: int) -> list[range]:
        """The rows of each call of the encoder: as few calls as there can be, of about as many
        rows.
        """
        size = min(CHUNK, self._max_batch_size)
        parts = math.ceil(count / size)
        edges = [count * part // parts for part in range(parts + 1)]
        return [range(*edge) for edge in itertools.pairwise(edges)]


class EmbedTexts:
    """Texts to embeddings.

    Args:
        release: its facts.
        tokenizer: the release's tokenizer.
        encode_tokens: int32 [B, L], with α where that is an input, -> float32 [B, D] of unit
            length.
    """

    def __init__(self, release: Release, tokenizer: Tokenizer, encode_tokens: Encode) -> None:
        self._tokenizer = tokenizer
        self._encode = encode_tokens
        self._request_alpha = release.request_alpha
        self._max_batch_size = release.max_batch_size

    def __call__(
        self, requests: Sequence[Sequence[bytes]], alphas: Sequence[ArrayLike | None] | None = None
    ) -> list[Outcome[NDArray[np.float32]]]:
        """Embed the texts (UTF-8) of several requests; for each float32 [B, D] or its error.

        Args:
            requests: the texts of each request.
            alphas: as of `EmbedImages`.
        """

        return run_good(_with_alphas(requests, alphas, self._request_alpha), self._at)

    def _at(
        self, requests: Sequence[tuple[Sequence[bytes], Alpha | None]]
    ) -> list[Outcome[NDArray[np.float32]]]:
        ready = [Outcome.of(partial(_rows_of_texts, *request)) for request in requests]
        unique = list(dict.fromkeys(row for rows in ready for row in rows.answer or ()))
        alphas = (
            np.array([[alpha] for _, alpha in unique], np.float32)
            if self._request_alpha.dynamic
            else None
        )
        texts = [text for text, _ in unique]
        embeds = embed_texts(
            texts, self._tokenizer, self._encode, self._max_batch_size, alpha=alphas
        )
        where = {row: index for index, row in enumerate(unique)}
        return [rows.then(lambda own: embeds[[where[row] for row in own]]) for rows in ready]


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
        unknown: score by itself of the best label below which an image is unknown, or None.
        examples: encoded images that show the labels, or None; an image whose examples are all
            empty has those of the image before.
        example_labels: places of the examples' labels, from 0.
        example_weight: of the examples of a label beside its text, one number for all labels or one
            for each; or None for half.
        cancelled: whether the caller has given up; None where that is unknown.
    """

    images: Sequence[bytes | ImageFile]
    labels: Sequence[Sequence[bytes]] | None = None
    label_set: Sequence[bytes] | None = None
    templates: Sequence[Sequence[bytes]] | None = None
    top_k: Sequence[int] | None = None
    alpha: ArrayLike | None = None
    multi_label: Sequence[bool] | None = None
    threshold: Sequence[float] | None = None
    calibrated: Sequence[bool] | None = None
    unknown: Sequence[float] | None = None
    examples: Sequence[Sequence[bytes]] | None = None
    example_labels: Sequence[Sequence[int]] | None = None
    example_weight: Sequence[ArrayLike] | None = None
    cancelled: Cancelled | None = None


@dataclass
class Classes:
    """The answer: labels, object [B, k] of str, and their scores, float32 [B, k], best first.

    An image with fewer labels above the threshold than another of its request has empty labels of
    score 0 at its end, and so has an image that is unknown; k is at least 1.
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
        self._by_example = ByExample(embed_images.at, embed_labels.store, embed_labels.release)
        self._label_source = LabelSource(release, embed_labels, label_sets, self._by_example)
        self._request_alpha = release.request_alpha
        self._scoring = Scoring(release)

    def __call__(self, requests: Sequence[ClassifyRequest]) -> list[Outcome[Classes]]:
        """Classify the images of several requests: all images together, each request against its
        own labels.

        Returns:
            For each request its classes, or its error; bad labels are refused before any image is
            encoded.
        """
        return run_good(
            [Outcome.of(partial(self._plan, request)) for request in requests], self._classify
        )

    def _plan(self, request: ClassifyRequest) -> _Plan:
        alpha = self._request_alpha(request.alpha, len(request.images))
        examples = read_examples(request.examples, request.example_labels, request.example_weight)
        scores = self._scoring(
            request.top_k,
            request.multi_label,
            request.threshold,
            request.calibrated,
            alpha,
            request.unknown,
            examples=examples is not None,
            label_set=request.label_set,
        )
        wanted = self._label_source.read(
            request.labels, request.label_set, request.templates, alpha
        )
        rows = self._embed_images.read(ImageRows(request.images, alpha, request.cancelled))
        if examples is not None:
            check_encoded(zip(examples, each(alpha, len(examples)), strict=True))
            check_request([*read_headers(rows.images), *read_shown(examples)])
            for own, count in zip(examples, wanted.counts, strict=True):
                check_places(own, count)
        sets = wanted.embed(request.cancelled)
        if examples is not None:
            sets = self._with_examples(sets, examples, alpha, request.cancelled)
        return _Plan(rows, sets, scores)

    def _with_examples(
        self,
        sets: Sequence[LabelSet],
        examples: Sequence[Examples],
        alpha: Alpha | None,
        cancelled: Cancelled | None,
    ) -> list[LabelSet]:
        """The label set of each image with its examples; images mostly share both."""
        made: dict[tuple[int, Examples], LabelSet] = {}
        found: list[LabelSet] = []
        for row, (label_set, own) in enumerate(zip(sets, examples, strict=True)):
            key = id(label_set), own
            if key not in made:
                at = None if alpha is None else alpha[row : row + 1]
                made[key] = self._by_example(label_set, own, at, cancelled)
            found.append(made[key])
        return found

    def _classify(self, plans: Sequence[_Plan]) -> list[Outcome[Classes]]:
        embeds = self._embed_images.at([plan.rows for plan in plans])
        return [one.then(plan.classes) for one, plan in zip(embeds, plans, strict=True)]


@dataclass(frozen=True)
class _Plan:
    """A request that is checked: its images with their α, the label set of each, and how its labels
    are scored.
    """

    rows: ImageRows
    sets: list[LabelSet]
    scores: Scores

    def classes(self, embeds: NDArray[np.float32]) -> Classes:
        """The best labels of the images.

        Args:
            embeds: of the images, float32 [B, D].
        """
        sets = self.sets
        finite(embeds)
        if all(label_set is sets[0] for label_set in sets):
            cosines = list(embeds @ sets[0].embeds.T)
        else:
            cosines = [
                label_set.embeds @ embed for label_set, embed in zip(sets, embeds, strict=True)
            ]
        found = [self.scores.best(cosine) for cosine in cosines]
        # As wide as the image with most; but where all are to have as many labels, as many as each
        # has.
        widths = [len(best) for best, _ in found]
        k = max(1, *widths) if self.scores.ragged else min(widths)
        labels = np.full((len(sets), k), "", object)
        scores = np.zeros((len(sets), k), np.float32)
        for row, ((best, values), label_set) in enumerate(zip(found, sets, strict=True)):
            labels[row, : len(best)] = [label_set.labels[index] for index in best[:k]]
            scores[row, : len(best)] = values[:k]
        if self.scores.doubt is not None:
            for row, cosine in enumerate(cosines):
                unknown = self.scores.doubt.unknown(cosine)
                if unknown is not None:
                    labels[row] = [UNKNOWN, *[""] * (k - 1)]
                    scores[row] = [unknown, *[0.0] * (k - 1)]
        return Classes(labels, scores)


def load_label_sets(folder: str | Path) -> dict[str, LabelSet]:
    """All `NAME.npz` of a folder by name; none if there is no such folder."""
    return {as_text(path.stem): LabelSet.load(path) for path in sorted(Path(folder).glob("*.npz"))}


def _rows_of(
    cancelled: Cancelled | None, images: tuple[Sequence[bytes | ImageFile], Alpha | None]
) -> ImageRows:
    return ImageRows(*images, cancelled=cancelled)


def _with_alphas(
    requests: Sequence[Sequence[T]],
    alphas: Sequence[ArrayLike | None] | None,
    check: RequestAlpha,
) -> list[Outcome[tuple[Sequence[T], Alpha | None]]]:
    """The rows of each request with their α, or the error of its α."""

    def checked(rows: Sequence[T], alpha: ArrayLike | None) -> tuple[Sequence[T], Alpha | None]:
        return rows, check(alpha, len(rows))

    given = [None] * len(requests) if alphas is None else alphas
    return [Outcome.of(partial(checked, *one)) for one in zip(requests, given, strict=True)]


def _first_error(decoded: Sequence[Outcome[None]]) -> TaskError | None:
    """The error of a request's first bad image; it says which, where there are several."""
    for number, outcome in enumerate(decoded, 1):
        error = outcome.error
        if error is not None and len(decoded) > 1:
            return TaskError(error.code, f"image {number} of {len(decoded)}: {error.message}")
        if error is not None:
            return error
    return None


def _rows_of_texts(request: Sequence[bytes], alpha: Alpha | None) -> list[tuple[str, float | None]]:
    texts = _texts(request)
    return list(zip(texts, each(alpha, len(texts)), strict=True))


def _texts(request: Sequence[bytes]) -> list[str]:
    texts = list(strings(*request))
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise invalid(f"text {number} of {len(texts)} is empty; give at least one word")
        check_length(text)
    return texts
