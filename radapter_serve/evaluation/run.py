"""Evaluate models on one data set or on a whole suite, and choose α by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from radapter_serve import __version__
from radapter_serve.adapter import load_adapter
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, choose, save_choice
from radapter_serve.evaluation.image_sets import Answer, EvaluationSet
from radapter_serve.evaluation.intervals import wilson
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate, NoSuchWay
from radapter_serve.evaluation.rows import KEPT, Results, Row, harmonic_means
from radapter_serve.evaluation.sets import open_set, own_validation
from radapter_serve.evaluation.suite import Suite

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scored:
    """A row, and the cosines of each image with each class that it was measured by, float32 [N, C];
    None where the data set has no classes of whole images.
    """

    row: Row
    cosines: Floats | None


def evaluate(models: Sequence[Candidate], data: EvaluationSet, **options: Any) -> list[Row]:
    """`evaluate_scored` that keeps the rows alone."""
    scored = evaluate_scored(models, data, keep_scores=False, **options)
    return [of.row for of in scored]


def evaluate_scored(
    models: Sequence[Candidate],
    data: EvaluationSet,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    kept: bool = False,
    keep_scores: bool = True,
) -> list[Scored]:
    """Evaluate models that prepare images alike on one data set; each image is read and decoded
    once.

    `progress` gets the images done and their number. `kept` measures what is kept of the base,
    where alpha 0 is among the models; see `Row`. Scores take 4 bytes for each model, image and
    class.
    """
    seconds = [0.0] * len(models)

    @contextmanager
    def turn(number: int) -> Iterator[None]:
        """Count a model's seconds; an error names the model and the data set."""
        start = time.perf_counter()
        try:
            yield
        except RAdapterError as error:
            name = models[number].name
            raise RAdapterError(f"data set {data.entry.name!r}, {name}: {error}") from error
        seconds[number] += time.perf_counter() - start

    # Each batch of images goes to every model.
    base = next((place for place, of in enumerate(models) if of.alpha == 0.0), None)
    ask_nouns = kept and base is not None and bool(data.nouns)
    answers: list[list[Answer]] = [[] for _ in models]
    done = 0
    for items in _batches(models[0], data, min(batch_size, data.most or batch_size)):
        for number, model in enumerate(models):
            with turn(number):
                answer = data.answer(model, done, items, ask_nouns=ask_nouns)
            if not keep_scores:
                answer = replace(answer, scores=None)
            answers[number].append(answer)
        done += len(items)
        if progress:
            progress(done, len(data))

    def nearest(number: int) -> Any:
        return np.concatenate([of.nearest for of in answers[number] if of.nearest is not None])

    # A row for each model.
    scored = []
    for number, model in enumerate(models):
        with turn(number):
            measured = data.measure(model, answers[number])
        row = replace(data.row(model), **measured, runtime=round(seconds[number], 3))
        if ask_nouns and base is not None:
            same = nearest(number) == nearest(base)
            share = float(same.mean())
            row = replace(
                row,
                metrics={**row.metrics, KEPT: share},
                intervals={**(row.intervals or {}), KEPT: wilson(share, len(same))},
            )
        scores = [of.scores for of in answers[number] if of.scores is not None]
        scored.append(Scored(row, np.concatenate(scores) if scores else None))
    return scored


def _batches(model: Candidate, data: EvaluationSet, batch_size: int) -> Iterator[list[Any]]:
    """Prepared images; the next batch is read and decoded while this one is embedded."""

    def item(number: int) -> Any:
        try:
            return data.prepare(model, number)
        except RAdapterError as error:
            raise RAdapterError(
                f"data set {data.entry.name!r}, {data.images[number].name}: {error}"
            ) from error

    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        numbers = iter(range(len(data)))
        ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
        try:
            while ahead:
                now = ahead
                ahead = [pool.submit(item, number) for number in islice(numbers, batch_size)]
                yield [future.result() for future in now]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def evaluate_suite(
    models: Sequence[Candidate],
    suite: Suite,
    results: Results,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    say: Say = lambda line: None,
    skip: Say | None = None,
    opened: Callable[[EvaluationSet], None] = lambda data: None,
) -> list[Row]:
    """Evaluate models of one kind on the data sets of one split of a suite; rows that `results` has
    are not made again.

    Where a suite has both the base and the novel classes of a data set, a row of their harmonic
    mean is added to the results. `skip` gets a line about each data set that these models can't be
    evaluated on, which is an error if it is None; `opened` gets each data set that they are
    evaluated on.
    """
    rows: list[Row] = []
    for entry in suite.of_split(split):
        say(f"{entry.name}: reading {entry.data}")
        data = open_set(suite, entry, limit=limit, seed=seed)
        stamp: dict[str, Any] = {"suite": suite.name, "seed": seed, "version": __version__}
        try:
            cases = [replace(data.row(model), **stamp) for model in models]
        except NoSuchWay as error:
            if skip is None:
                raise
            skip(f"{entry.name} is left out: {error}")
            continue
        opened(data)
        # The share that is kept of the base is measured together with alpha 0.
        keeps = bool(data.nouns) and any(model.alpha == 0.0 for model in models)
        rows_before = [results.find(case) for case in cases]
        missing = [row is None or (keeps and KEPT not in row.metrics) for row in rows_before]
        if any(missing):
            wanted = [
                model
                for model, lacks in zip(models, missing, strict=True)
                if lacks or (keeps and model.alpha == 0.0)
            ]
            by = f"{len(wanted)} model{'s' if len(wanted) > 1 else ''}"
            say(f"{entry.name}: embedding its texts by {by}")
            new = evaluate(
                wanted,
                data,
                batch_size=batch_size,
                kept=keeps,
                progress=lambda done, n, name=entry.name, by=by: say(  # type: ignore[misc]
                    f"{name}: {done} of {n} images by {by}"
                ),
            )
            results.add(replace(row, **stamp) for row in new)
        rows += [row for case in cases if (row := results.find(case)) is not None]
    means = [row for row in harmonic_means(rows, suite.pairs(split)) if results.find(row) is None]
    if means:
        results.add(means)
    return rows


def choose_alpha(
    models: Sequence[Candidate],
    adapter: str | Path,
    suite: Suite | None,
    results: Results,
    **options: Any,
) -> tuple[Choice, Path]:
    """Choose α on validation data, and write the choice beside the adapter; returns both.

    The models are an adapter at every α that may be chosen, its own among them. The data are the
    suite's validation sets, else those that the run was trained with. `options` are those of
    `evaluate_suite`.
    """
    metadata = load_adapter(adapter).metadata
    if suite is None or not suite.of_split("validation"):
        suite = own_validation(metadata)
    models = [model for model in models if model.source == "adapter"]
    rows = evaluate_suite(models, suite, results, split="validation", **options)
    choice = choose(rows, metadata.alpha)
    return choice, save_choice(choice, adapter)


class Overlap:
    """Compares the images of test sets with those of validation sets, by the digests of their
    files: the figures of what the same images chose are too high.
    """

    def __init__(self) -> None:
        self._set_of: dict[str, str] = {}
        self.warnings: list[str] = []  # a line for each test set that has some in common

    def chosen_by(self, data: EvaluationSet) -> None:
        """Take a set that something is chosen by."""
        self._set_of |= dict.fromkeys(data.contents, data.entry.name)

    def tested(self, data: EvaluationSet) -> None:
        """Take a test set."""
        sets = [self._set_of[digest] for digest in data.contents if digest in self._set_of]
        if sets:
            self.warnings.append(
                f"{data.entry.name}: warning: {len(sets)} of its {len(data)} images are validation"
                f" images of {', '.join(sorted(set(sets)))} too; the figures of what they chose"
                " are too high"
            )
