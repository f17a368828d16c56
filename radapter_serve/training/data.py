"""The data of a run: opened and checked without torch, then made ready for a base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from radapter_serve.contract.images import SUFFIXES, count_kinds
from radapter_serve.contract.labels import read_templates
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import IMAGENET, Labelled, few_shot, split_labels
from radapter_serve.data.masks import Masked, SegmentCrops, list_segments
from radapter_serve.data.rows import image_source, open_rows
from radapter_serve.data.runs import broken_images, equal_names, run_data, validation_data
from radapter_serve.errors import RAdapterError, listed
from radapter_serve.index.facts import IndexFacts
from radapter_serve.index.folder import FolderIndex, map_vectors, unit_vectors
from radapter_serve.sources import LOCAL
from radapter_serve.training.recipe import Recipe

if TYPE_CHECKING:
    from radapter_serve.clip.base import Base

Data = Labelled | Captioned | SegmentCrops
T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a run's images, which were made elsewhere."""

    vectors: NDArray[np.float32]  # of unit length [N, D]
    source: str  # in messages
    index: IndexFacts | None  # None for those of a NumPy file


@dataclass(frozen=True)
class RunData:
    """The data of a run, checked as far as possible without a model."""

    data: Data
    val: Data | None  # `val_data`, or the share that `val_fraction` holds out
    embedded: Embedded | None = None  # None if the images are read
    broken: tuple[str, ...] = ()  # rows that `on_broken: skip` leaves out
    notes: tuple[str, ...] = ()  # notes for the user, one line each

    def ready(self, recipe: Recipe, base: Base) -> tuple[Data, Data | None]:
        """The data with the templates of its recipe, and masks cropped for the base."""
        from radapter_serve.clip.towers import templates_of

        def prepared(data: Data) -> Data:
            if isinstance(data, Captioned):
                return data
            templates = templates_of(recipe.templates)
            if isinstance(data, Labelled):
                return dataclasses.replace(data, templates=templates)
            crop = recipe.mask_crop(base.preprocess["mean"])
            return dataclasses.replace(data, crop=crop, templates=templates)

        return prepared(self.data), None if self.val is None else prepared(self.val)


def open_embeddings(data: Labelled | Captioned, recipe: Recipe) -> Embedded:
    """Open the embeddings of a run's images, in an index or in a NumPy file with a table."""
    facts: IndexFacts | None = None
    if recipe.embeddings is None:
        index = FolderIndex(Path(recipe.data.partition(":")[2]), codes=False)
        facts = index.facts
        source = f"the index {index.folder}"
        if facts.mapped is not None:
            raise RAdapterError(
                f"{source} is mapped, and training needs embeddings of the model itself; embed its"
                f" images: {facts.plan.command(index.folder)}"
            )
        array = index.vectors
        ids = index.table(["path"])["path"]
    else:
        assert recipe.rows is not None  # Recipe.check
        source = str(recipe.embeddings)
        table = open_rows(recipe.data, {recipe.image_column: "--image-column"}).table
        ids = pa.chunked_array([[str(image_source(value)) for value in table[recipe.image_column]]])
        unique = isinstance(data, Labelled)
        array = map_vectors(recipe.embeddings, recipe.rows, ids, unique=unique)

    # Take the first vector of each image: captions are in rows of their own.
    number_of: dict[str, int] = {}
    for number, id in enumerate(ids.to_pylist()):
        number_of.setdefault(id, number)
    places = [number_of[str(image_source(v))] for v in data.image_rows[data.image_column]]
    vectors = unit_vectors(np.asarray(array[places], np.float32), source, places)
    return Embedded(vectors, source, facts)


def class_problems(data: Labelled | Masked, recipe: Recipe) -> list[str]:
    """What is wrong with the classes, one message each."""
    problems = []
    if len(data.classes) < 2:
        problems.append(
            f"{recipe.data} has the one class {data.classes[0]!r}; training tells classes apart, so"
            " it needs two"
        )
    same = [] if str(recipe.classes) == IMAGENET else equal_names(data)
    if same:
        problems.append(
            f"CLIP reads these classes of {recipe.data} as one, because their names differ only in"
            " case, spaces and underscores; merge them, or name them apart with --classes"
            f" FILE:{listed(same)}"
        )
    return problems


def label_notes(data: Labelled, recipe: Recipe) -> list[str]:
    """Notes about files that are no images, and about labels."""
    notes = []
    if data.left_out:
        kinds = count_kinds(data.left_out)
        notes.append(f"note: left out {kinds}; images are {', '.join(SUFFIXES)}")
    parted = [name for name in data.keys if len(split_labels(name, ";")) > 1]
    if data.several:
        count = sum(len(labels) > 1 for labels in data.label_sets())
        notes.append(f"note: {count:,} of {len(data.rows):,} images have several labels")
    elif parted:
        notes.append(
            f"note: {len(parted)} class names of {recipe.data} hold a semicolon, such as"
            f" {parted[0]!r}; --label-separator ';' would read them as several labels"
        )
    return notes


def check_images(
    part: Labelled | Captioned | Masked, spec: str, recipe: Recipe, progress: bool
) -> list[str]:
    """Refuse images of `spec` that can't be read, or note that they are left out."""
    names = broken_images(part, progress=progress)
    if not names:
        return []
    count = len(part.rows if isinstance(part, Labelled) else part.images)
    few = f"{len(names):,} of {count:,} images of {spec} can't be read"
    leave_out = "or leave such images out with --on-broken skip"
    if recipe.on_broken == "skip" and len(names) < count:
        return [f"note: {few}, and are left out"]
    if recipe.on_broken == "skip":
        raise RAdapterError(
            f"not one of {count:,} images of {spec} can be read; the first: {names[0]}"
        )
    if len(names) == 1:
        raise RAdapterError(f"{names[0]}; mend it, {leave_out}")
    raise RAdapterError(f"{few}; mend them, {leave_out}:{listed(names)}")


def missing_files(recipe: Recipe) -> dict[str, str]:
    """A message for each field of a recipe whose file or folder is not there."""
    missing = {}
    model = recipe.architecture.removeprefix(LOCAL)
    if recipe.architecture.startswith(LOCAL) and not Path(model).is_dir():
        missing["architecture"] = f"{model} is not a model folder; see --architecture"
    if recipe.images is not None and not recipe.images.is_dir():
        missing["images"] = f"there is no folder {recipe.images}; see --images"
    classes = recipe.classes
    if classes is not None and str(classes) != IMAGENET and not classes.is_file():
        missing["classes"] = f"there is no class file {classes}; see --classes"
    return missing


def open_run(recipe: Recipe, *, images: bool = True, progress: bool = True) -> RunData:
    """Open the data of a recipe for its task, and report all problems in one error."""
    missing = missing_files(recipe)
    problems = [*missing.values()]
    notes: list[str] = []
    broken: list[str] = []

    def tried(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except RAdapterError as error:
            problems.append(str(error))
            return None

    # Open the data, without files that are missing.
    without: dict[str, Any] = dict.fromkeys(missing.keys() - {"architecture"})
    source = dataclasses.replace(recipe, **without)
    if recipe.templates != "openai":
        tried(lambda: read_templates(recipe.templates))
    data, val = tried(lambda: run_data(source, broken)) or (None, None)
    if recipe.val_data:
        names = None if data is None or isinstance(data, Captioned) else data.classes
        val = tried(lambda: validation_data(source, names, broken))

    # Check its classes and labels.
    if isinstance(data, Labelled | Masked):
        problems += class_problems(data, recipe)
    if isinstance(data, Labelled):
        notes += label_notes(data, recipe)
        if recipe.shots is not None:
            data = few_shot(data, recipe.shots, recipe.seed)

    # Check the images, in one of several processes, or open their embeddings.
    embedded: Embedded | None = None
    if recipe.has_embeddings:
        if isinstance(data, Labelled | Captioned):
            embedded = tried(partial(open_embeddings, data, recipe))
    elif images and "images" not in missing and os.environ.get("RANK", "0") == "0":
        for part, spec in ((data, recipe.data), (val, recipe.val_data or "the share held out")):
            if part is not None:
                notes += tried(partial(check_images, part, spec, recipe, progress)) or []

    # List the segments of images with masks.
    def segmented(part: Labelled | Captioned | Masked | None) -> Data | None:
        if not isinstance(part, Masked):
            return part
        skipped = broken if recipe.on_broken == "skip" else None
        return tried(lambda: list_segments(part, recipe.mask_min_area, skipped, progress=progress))

    opened = segmented(data)
    opened_val = segmented(val)
    if opened is not None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        tried(lambda: recipe.resolved(len(opened.rows), processes))
    if problems or opened is None:
        raise refusal([*dict.fromkeys(problems)], resume=recipe.resume)
    return RunData(opened, opened_val, embedded, tuple(broken), tuple(notes))


def refusal(problems: list[str], *, resume: bool) -> RAdapterError:
    """An error of all problems of a run's data."""
    *others, last = problems
    if resume:
        last += (
            f"; a resumed run looks for relative places in {Path.cwd()}, so start it where it began"
        )
    if not others:
        return RAdapterError(last)
    lines = "".join(f"\n  - {problem}" for problem in (*others, last))
    return RAdapterError(f"the data of this run has {len(problems)} problems:{lines}")
