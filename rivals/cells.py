"""Cells of a table: a method and a seed, trained and evaluated once, and kept in a file."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import normalised
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.models import Candidate, candidates_in_torch
from radapter_serve.evaluation.rows import Row, by_shift, own_metric, unpacked
from radapter_serve.evaluation.run import evaluate_set, warn_of_overlap
from radapter_serve.process import limit_threads
from rivals.benchmark import Benchmark
from rivals.method import Cost, Learned, Method, Run, System, kept, learned, moved


def judge(
    learned: Learned, run: Run, sets: Sequence[EvaluationSet], alphas: Sequence[float] = (1.0,)
) -> list[Row]:
    """Evaluate a system at points of its line: a plain CLIP as `radapter-eval` does, any other by
    its own embeddings. No system may have been started on the run's base, which it would change.
    """
    weights = learned.at(1.0).clip()
    models: Sequence[Candidate]
    if weights is None:
        models = systems_of(learned, run.base, alphas)
    else:
        start = run.base.model.state_dict()
        changes = {key: value.float().cpu() - start[key].float() for key, value in weights.items()}
        changes = {key: change for key, change in changes.items() if change.any()}
        crop = run.recipe.mask_crop(run.base.preprocess["mean"])
        name = type(learned.system).__name__
        models = candidates_in_torch(name, run.base, changes, alphas, crop=crop)
    return [row for data in sets for row, _ in evaluate_set(models, data)]


def systems_of(learned: Learned, base: Base, alphas: Sequence[float]) -> list[SystemModel]:
    """Make models of a system at points of its line, with the preprocessing of a base."""
    models = []
    for model in candidates_in_torch(type(learned.system).__name__, base, {}, alphas):
        assert model.alpha is not None
        scale = learned.at(model.alpha).factor
        loaded = copy.copy(model.loaded)
        loaded.release = dataclasses.replace(loaded.release, logit_scale=scale, logit_bias=None)
        models.append(SystemModel(model.source, model.alpha, model.facts, loaded, learned=learned))
    return models


@dataclass(frozen=True, eq=False)
class SystemModel(Candidate):
    """A system at a point of its line."""

    learned: Learned = field(kw_only=True)
    # Cache of class embeddings, float32 [C, D], by templates and classes.
    known: dict[tuple[tuple[str, ...], str], Floats] = field(default_factory=dict)

    @property
    def system(self) -> System:
        """The system, with its weights at this point."""
        assert self.alpha is not None
        return self.learned.at(self.alpha)

    @torch.inference_mode()
    def embed_images(self, items: Sequence[Any]) -> Floats:
        preprocess = vars(self.loaded.release.preprocess)
        system = self.system
        embeds = system.embed_images(normalised(np.stack(items), preprocess, system.device))
        return np.asarray(embeds.float().cpu().numpy())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return np.asarray(self.system.embed_texts(texts).float().cpu().numpy())

    @torch.inference_mode()
    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Floats:
        """Embed all classes together, as two may have the same name."""
        key = (tuple(templates), "\n".join(classes))
        if key not in self.known:
            embeds = self.system.embed_classes(list(classes), templates)
            self.known[key] = np.asarray(embeds.float().cpu().numpy())
        return self.known[key]

    def dense_method(self, dense: str | None) -> str:
        raise RAdapterError(
            f"{self.source} is not a plain CLIP, so it can't segment; leave it out by --only"
        )


T = TypeVar("T")
ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True)
class Judged:
    """The fields of a row of results that a cell keeps."""

    dataset: str
    task: str
    shift: str
    split: str
    alpha: float | None
    n: int
    metric: str
    metrics: dict[str, float]
    set_digest: str
    captions: int | None = None
    right: str | list[int] | None = None

    @classmethod
    def of(cls, row: Row) -> Judged:
        return cls(**{field.name: getattr(row, field.name) for field in dataclasses.fields(cls)})

    @property
    def per_image(self) -> NDArray[np.float64] | None:
        """Each image's part of the metric, [n]; None in files of older versions."""
        return None if self.right is None else unpacked(self.right, self.n, self.captions)


@dataclass(frozen=True)
class Cell:
    """The results of a method, as stored in a file: a digest of everything that they depend on, the
    method's name in its table and its `repr`, the seed of training, the split of the evaluation,
    the cost of training, and a row for every set and α.
    """

    digest: str
    name: str
    seed: int
    split: str
    method: str
    cost: Cost
    rows: list[Judged]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Cell:
        rows = [Judged(**row) for row in values["rows"]]
        return cls(**{**values, "cost": Cost(**values["cost"]), "rows": rows})


def read_cells(path: Path, cell: Callable[[Any], T]) -> list[T]:
    """Read the cells in a file, each made from a line of JSON; none if the file is missing."""
    cells = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, text in enumerate(lines, 1):
        try:
            cells.append(cell(json.loads(text)))
        except (ValueError, TypeError, KeyError) as error:
            raise RAdapterError(
                f"line {number} of {path} is not a cell ({reason(error)}); remove it, to make the"
                " cell again"
            ) from None
    return cells


def keep_cell(path: Path, values: Mapping[str, Any]) -> None:
    """Append a cell to a file, as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n")


@dataclass
class Cells:
    """All cells of a benchmark, kept in a folder.

    Cells of all tables are read from there; new ones are appended to `TABLE.jsonl`, one a line. A
    set has at most `limit` images, and `say` is called with messages of progress.
    """

    benchmark: Benchmark
    folder: Path
    table: str = "cells"
    limit: int | None = None
    say: Callable[[str], None] = print
    _runs: dict[int, Run] = field(default_factory=dict)
    _sets: dict[str, list[EvaluationSet]] = field(default_factory=dict)

    def cell(
        self, name: str, method: Method, seed: int, alphas: Sequence[float], split: str = "test"
    ) -> Cell:
        """Train a method and evaluate it at points of its line on the sets of a split, or read the
        cell if a file has it; `name` is for messages and files.
        """
        # The digest covers everything that the cell depends on. Fields of a set with default values
        # are left out, so that a new field changes no digest.
        run = self._run(seed)
        sets = self._open(split)
        entries = [
            {
                field.name: moved(getattr(data.entry, field.name))
                for field in dataclasses.fields(data.entry)
                if getattr(data.entry, field.name) != field.default
            }
            for data in sets
        ]
        facts = [[data.set_digest for data in sets], entries, list(alphas)]
        of_method = run.of(method.settings)
        digest = of_method.digest(dataclasses.replace(method, alpha=None), *facts)
        if digest in self._kept:
            return self._kept[digest]

        if not kept(method, run).exists():
            self.say(f"{name}, seed {seed}: learning")
            _apart(method, run)
        self.say(f"{name}, seed {seed}: judging")
        system = learned(method, run)
        rows = [Judged.of(row) for row in judge(system, run.of(method.settings), sets, alphas)]
        cell = Cell(digest, name, seed, split, repr(method), system.cost, rows)
        self._kept[digest] = cell
        keep_cell(self.folder / f"{self.table}.jsonl", dataclasses.asdict(cell))
        return cell

    def warnings(self) -> list[str]:
        """Warn of test sets that share images with the validation sets, one line each."""
        return warn_of_overlap(self._sets.get("validation", []), self._sets.get("test", []))

    @cached_property
    def _kept(self) -> dict[str, Cell]:
        paths = sorted(self.folder.glob("*.jsonl"))
        cells = [cell for path in paths for cell in read_cells(path, Cell.of)]
        return {cell.digest: cell for cell in cells}

    def _run(self, seed: int) -> Run:
        if seed not in self._runs:
            fields = {**self.benchmark.fields, "seed": seed}
            self._runs[seed] = Run(fields, self.folder / "learned")
        return self._runs[seed]

    def _open(self, split: str) -> list[EvaluationSet]:
        if split not in self._sets:
            self._sets[split] = self.benchmark.sets(split, self.limit)
        return self._sets[split]


def score(rows: Sequence[Judged]) -> float:
    """Compute the score of a choice from one row of each validation set: the mean of two means,
    over the sets in distribution and over the shifted sets, rounded.
    """
    values = {row.dataset: own_metric(row) for row in rows}
    groups = [names for names in by_shift({row.dataset: row for row in rows}) if names]
    return round(mean(mean(values[name] for name in names) for names in groups), 6)


def _apart(method: Method, run: Run) -> None:
    """Train in a fresh process, so that the peak memory is that of training alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            pool.submit(_learn, method, run.fields, run.folder).result()
        except RAdapterError as error:
            raise RAdapterError(f"{type(method).__name__}: {error}") from error


def _learn(method: Method, fields: Mapping[str, Any], folder: Path) -> None:
    limit_threads(fields.get("threads"))
    learned(method, Run(fields, folder))
