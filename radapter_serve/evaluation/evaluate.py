"""Evaluate models on one data set: embed its images once for every model, and compare the answers
with the truth.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Embedder, Variant
from radapter_serve.evaluation.evaluation_set import EvaluationSet, Known, Scorer
from radapter_serve.evaluation.intervals import wilson
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.results import KEPT, model_name
from radapter_serve.evaluation.row import Case, Measured, Row


@dataclass(frozen=True)
class Scored:
    """What was measured of a model, and the scores that it was measured by.

    Attributes:
        row: the figures.
        cosines: of each image with each class, float32 [N, C]; None where the data set has no
            classes of whole images.
    """

    row: Row
    cosines: Floats | None


def evaluate(
    embedder: Embedder,
    data: EvaluationSet,
    variants: Sequence[Variant] | None = None,
    *,
    batch_size: int = 64,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
    known: dict[Any, Known] | None = None,
    kept: bool = False,
) -> list[Row]:
    """Evaluate models on one data set; each image is read and decoded once.

    Args:
        embedder: holds the models.
        data: from `open_set`.
        variants: which of the embedder's models; all if None.
        batch_size: images a pass, where the set allows as many.
        threads: images that are decoded at once.
        progress: called with the images done and their number.
        known: embeddings of classes by the key of a model, shared by calls with the same embedder;
            new ones are added.
        kept: measure what is kept of the base, where alpha 0 is among the models; see `Measured`.

    Returns:
        A row a model.

    Raises:
        RAdapterError: an image can't be read; a model fails, or gives values that are not finite.
    """
    return [
        one.row
        for one in _measure(
            embedder,
            data,
            embedder.variants if variants is None else variants,
            batch_size=batch_size,
            threads=threads,
            progress=progress,
            known={} if known is None else known,
            keep_cosines=False,
            kept=kept,
        )
    ]


def evaluate_scored(
    embedder: Embedder,
    data: EvaluationSet,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    known: dict[Any, Known] | None = None,
) -> list[Scored]:
    """`evaluate` for all models of an embedder, which keeps the scores too: 4 bytes for each model,
    image and class.
    """
    return _measure(
        embedder,
        data,
        embedder.variants,
        batch_size=batch_size,
        progress=progress,
        known={} if known is None else known,
        keep_cosines=True,
    )


def _measure(
    embedder: Embedder,
    data: EvaluationSet,
    variants: Sequence[Variant],
    *,
    batch_size: int = 64,
    threads: int = 2,
    progress: Callable[[int, int], None] | None,
    known: dict[Any, Known],
    keep_cosines: bool,
    kept: bool = False,
) -> list[Scored]:
    kept = kept and any(variant.alpha == 0.0 for variant in variants)
    models = [_Model(embedder, data, variant) for variant in variants]
    scorers: list[Scorer] = []
    for model in models:
        with model.turn():
            texts = known.setdefault(model.variant.key, {})
            scorers.append(data.scorer(embedder, texts, ask_nouns=kept))
    all_cosines: list[list[Floats]] = [[] for _ in models]
    done = 0
    for items in _batches(embedder, data, min(batch_size, data.most or batch_size), threads):
        for model, scorer, own in zip(models, scorers, all_cosines, strict=True):
            with model.turn():
                cosines = scorer.add(items)
            if keep_cosines and cosines is not None:
                own.append(cosines)
        done += len(items)
        if progress:
            progress(done, len(data))
    base = next(
        (of for model, of in zip(models, scorers, strict=True) if model.variant.alpha == 0.0), None
    )
    scored = []
    for model, scorer, own in zip(models, scorers, all_cosines, strict=True):
        with model.turn():
            measured = scorer.measured()
        if base is not None and base.nearest:
            measured = _with_kept(measured, scorer, base)
        case = case_of(embedder, data, model.variant)
        row = Row(**vars(case), **vars(measured), runtime=round(model.seconds, 3))
        scored.append(Scored(row, np.concatenate(own) if own else None))
    return scored


def _with_kept(measured: Measured, scorer: Scorer, base: Scorer) -> Measured:
    """What was measured, with the share of images whose best noun is the base's."""
    same = np.concatenate(scorer.nearest) == np.concatenate(base.nearest)
    share = float(same.mean())
    return dataclasses.replace(
        measured,
        metrics={**measured.metrics, KEPT: share},
        intervals={**(measured.intervals or {}), KEPT: wilson(share, len(same))},
    )


def case_of(embedder: Embedder, data: EvaluationSet, variant: Variant) -> Case:
    """One of the models on the data set.

    Raises:
        NoSuchWay: the models do not have the dense embeddings that the set asks for.
    """
    entry = data.entry
    return Case(
        **vars(variant.facts),
        **vars(data.facts),
        **vars(data.setup(embedder)),
        dataset=entry.name,
        task=data.task,
        language=entry.language,
        source=variant.source,
        alpha=variant.alpha,
        shift=entry.shift,
        split=entry.split,
        metric=entry.metric,
        border=entry.border,
        exif_orientation=entry.exif_orientation,
    )


class _Model:
    """One of the models that take turns, and the seconds that its turns took."""

    def __init__(self, embedder: Embedder, data: EvaluationSet, variant: Variant) -> None:
        self.variant = variant
        self.seconds = 0.0
        self._embedder = embedder
        self._data = data

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Select the model and count the seconds; an error names the model and the data set."""
        start = time.perf_counter()
        try:
            self._embedder.select(self.variant)
            yield
        except RAdapterError as error:
            model = model_name(self.variant.source, self.variant.alpha)
            raise RAdapterError(f"data set {self._data.entry.name!r}, {model}: {error}") from error
        self.seconds += time.perf_counter() - start


def _batches(
    embedder: Embedder, data: EvaluationSet, batch_size: int, threads: int
) -> Iterator[list[Any]]:
    """Prepared images; the next batch is read and decoded while this one is embedded."""

    def item(number: int) -> Any:
        try:
            return data.prepare(embedder, number)
        except RAdapterError as error:
            raise RAdapterError(
                f"data set {data.entry.name!r}, {data.images[number].name}: {error}"
            ) from error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        numbers = iter(range(len(data)))
        ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
        try:
            while ahead:
                now = ahead
                ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
                yield [future.result() for future in now]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
