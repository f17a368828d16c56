"""Evaluate models on one data set or on a whole suite, and choose α by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from radapter_serve import __version__
from radapter_serve.adapter import load_adapter
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, choose, save_choice
from radapter_serve.evaluation.image_sets import Answers, EvaluationSet
from radapter_serve.evaluation.metrics import wilson
from radapter_serve.evaluation.models import Candidate, NoSuchWay
from radapter_serve.evaluation.rows import KEPT, Results, Row, harmonic_means
from radapter_serve.evaluation.sets import open_set, own_validation
from radapter_serve.evaluation.suite import Suite

Say = Callable[[str], None]


def evaluate(models: Sequence[Candidate], data: EvaluationSet, **options: Any) -> list[Row]:
    """The rows of `evaluate_answers`."""
    return [row for row, _ in evaluate_answers(models, data, **options)]


def evaluate_answers(
    models: Sequence[Candidate],
    data: EvaluationSet,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    keep: Sequence[str] = (),
) -> list[tuple[Row, Answers]]:
    """Evaluate models that prepare images alike on one data set; each image is read and decoded
    once.

    `progress` gets the images done and their number. To `keep` "nouns" measures what is kept of the
    base, which is the first model of alpha 0; see `Row`. To keep "scores" takes 4 bytes for each
    model, image and class.
    """
    seconds = [0.0] * len(models)
    parts: list[list[Answers]] = [[] for _ in models]

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
    done = 0
    for items in _batches(models[0], data, min(batch_size, data.most or batch_size)):
        for number, model in enumerate(models):
            with turn(number):
                parts[number].append(data.answer(model, done, items, keep))
        done += len(items)
        if progress:
            progress(done, len(data))

    # A row for each model.
    answers = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in parts
    ]
    rows = []
    for number, model in enumerate(models):
        with turn(number):
            measured = data.measure(model, answers[number])
        row = replace(data.row(model), **measured, runtime=round(seconds[number], 3))
        if "nouns" in keep:
            base = next(place for place, other in enumerate(models) if other.alpha == 0.0)
            same = answers[number]["nouns"] == answers[base]["nouns"]
            share = float(same.mean())
            row = replace(
                row,
                metrics={**row.metrics, KEPT: share},
                intervals={**(row.intervals or {}), KEPT: wilson(share, len(same))},
            )
        rows.append(row)
    return list(zip(rows, answers, strict=True))


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
        keep = ["nouns"] if data.nouns and any(model.alpha == 0.0 for model in models) else []
        missing = []
        for model, case in zip(models, cases, strict=True):
            row = results.find(case)
            if row is None or (keep and KEPT not in row.metrics):
                missing.append(model)
        if missing:
            wanted = [m for m in models if m in missing or (keep and m.alpha == 0.0)]
            by = f"{len(wanted)} model{'s' if len(wanted) > 1 else ''}"
            say(f"{entry.name}: embedding its texts by {by}")
            new = evaluate(
                wanted,
                data,
                batch_size=batch_size,
                keep=keep,
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


def warn_of_overlap(
    choosing: Iterable[EvaluationSet], testing: Iterable[EvaluationSet]
) -> list[str]:
    """A line for each test set that has images, by the digests of their files, in common with
    the validation sets: the figures of what these chose are too high.
    """
    set_of = {digest: data.entry.name for data in choosing for digest in data.contents}
    warnings = []
    for data in testing:
        sets = [set_of[digest] for digest in data.contents if digest in set_of]
        if sets:
            warnings.append(
                f"{data.entry.name}: warning: {len(sets)} of its {len(data)} images are validation"
                f" images of {', '.join(sorted(set(sets)))} too; the figures of what they chose"
                " are too high"
            )
    return warnings
