"""One way to judge: embed a data set's images once for every model, and compare with the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import Embedder, Variant
from radapter_serve.evaluation.judged import JudgedSet, Known

Row = dict[str, Any]


def judge(
    embedder: Embedder,
    data: JudgedSet,
    variants: Sequence[Variant] | None = None,
    *,
    batch_size: int = 64,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
    known: dict[tuple[str, float | None], Known] | None = None,
) -> list[Row]:
    """Judge models on one data set; each image is read and decoded once.

    Args:
        embedder: holds the models.
        data: from `open_set`.
        variants: which of the embedder's models; all if None.
        batch_size: images a pass, where the set allows as many.
        threads: images that are decoded at once.
        progress: called with the images done and their number.
        known: embeddings of classes by model, for calls with the same embedder; takes new ones.

    Returns:
        A row a model, in CLIP_benchmark's schema and more: what `Scorer.measured` tells, `runtime` in seconds of
        embedding and scoring, without reading and decoding.

    Raises:
        RAdapterError: an image can't be read; a model fails, or gives values that are not finite.
    """
    known = {} if known is None else known
    chosen = list(embedder.variants if variants is None else variants)
    seconds, scorers = [0.0] * len(chosen), []
    for number, variant in enumerate(chosen):
        start = time.perf_counter()
        embedder.select(variant)
        of_model = known.setdefault((variant.source, variant.alpha), {})
        with _named(data, variant):
            scorers.append(data.scorer(embedder, of_model))
        seconds[number] += time.perf_counter() - start
    done = 0
    for items in _batches(embedder, data, min(batch_size, data.most or batch_size), threads):
        for number, variant in enumerate(chosen):
            start = time.perf_counter()
            embedder.select(variant)
            with _named(data, variant):
                scorers[number].add(items)
            seconds[number] += time.perf_counter() - start
        done += len(items)
        if progress:
            progress(done, len(data))
    rows = []
    for number, (variant, scorer) in enumerate(zip(chosen, scorers, strict=True)):
        start = time.perf_counter()
        with _named(data, variant):
            measured = scorer.measured()
        seconds[number] += time.perf_counter() - start
        rows.append({**facts_of(embedder, data, variant), **measured, "runtime": round(seconds[number], 3)})
    return rows


def facts_of(embedder: Embedder, data: JudgedSet, variant: Variant) -> Row:
    """What identifies a row: all of it but what was measured, CLIP_benchmark's fields first.

    Raises:
        NoSuchWay: the models do not have the dense embeddings that the set is to be judged by.
    """
    facts = dict(variant.facts)
    return {
        "dataset": data.entry.name,
        "model": facts.pop("model", None),
        "pretrained": facts.pop("pretrained", None),
        "task": data.task,
        "language": data.entry.language,
        "source": variant.source,
        "alpha": variant.alpha,
        "shift": data.entry.shift,
        "split": data.entry.split,
        "metric": data.entry.metric,
        **({"border": data.entry.border} if data.entry.border else {}),
        **({} if data.entry.exif_orientation else {"exif_orientation": False}),
        **facts,
        **data.facts,
        **data.how(embedder),
    }


@contextmanager
def _named(data: JudgedSet, variant: Variant) -> Iterator[None]:
    """Name the data set and the model in an error."""
    try:
        yield
    except RAdapterError as error:
        model = variant.source + ("" if variant.alpha is None else f" at alpha {variant.alpha:g}")
        raise RAdapterError(f"data set {data.entry.name!r}, {model}: {error}") from error


def _batches(embedder: Embedder, data: JudgedSet, batch_size: int, threads: int) -> Iterator[list[Any]]:
    """Prepared images; the next batch is read and decoded while this one is embedded."""

    def item(number: int) -> Any:
        try:
            return data.prepare(embedder, number)
        except RAdapterError as error:
            raise RAdapterError(f"data set {data.entry.name!r}, {data.name(number)}: {error}") from error

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        numbers = iter(range(len(data)))
        ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
        try:
            while ahead:
                now, ahead = ahead, [pool.submit(item, number) for number in islice(numbers, batch_size)]
                yield [future.result() for future in now]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
