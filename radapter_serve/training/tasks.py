"""The data of a run: opened and checked without torch, then made ready for a base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from radapter_serve.contract.image_files import SUFFIXES, count_kinds
from radapter_serve.contract.labels import read_templates
from radapter_serve.data import Captioned, Labelled, Masked, few_shot, run_data, validation_data
from radapter_serve.data.checks import broken_images, equal_names
from radapter_serve.data.classes import IMAGENET
from radapter_serve.data.labelled import split_labels
from radapter_serve.data.segments import SegmentCrops, Segments, list_segments
from radapter_serve.errors import RAdapterError, all_of, listed
from radapter_serve.hub import LOCAL
from radapter_serve.training.recipe import Recipe

if TYPE_CHECKING:
    from radapter_serve.clip.base import Base

Data = Labelled | Captioned | SegmentCrops
Opened = Labelled | Captioned | Segments
T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """The data of a run, which is all right as far as it can be seen without a model.

    Attributes:
        data, val: what to train with, and what to validate on: all of `val_data`, or `val_fraction`
            of the data, or nothing.
        images: that an epoch goes through, or captions; None where nobody knows, as of a stream.
        broken: rows that `on_broken: skip` leaves out.
        notes: what a user should know of the data, a line each.
    """

    data: Opened
    val: Opened | None
    images: int | None
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def ready(self, recipe: Recipe, base: Base) -> tuple[Data, Data | None]:
        """The data with the recipe's templates, images with masks by their segments.

        Args:
            recipe: that it was opened by.
            base: whose mean fills what is outside a segment.
        """
        return _ready(recipe, base, self.data), (
            None if self.val is None else _ready(recipe, base, self.val)
        )


def open_run(recipe: Recipe, *, images: bool = True, progress: bool = True) -> RunData:
    """Open the data of a recipe as its task reads it, and find all that is wrong with it.

    Args:
        recipe: names the task, the data and its columns.
        images: look at the images themselves, see `broken_images`.
        progress: show how far that is.

    Raises:
        RAdapterError: it can't be read, is no data for this task, or images can't be read; names
            all of these.
    """
    problems: list[str] = []
    notes: list[str] = []
    broken: list[str] = []

    def tried(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except RAdapterError as error:
            problems.append(str(error))
            return None

    missing = _missing(recipe)
    problems += missing.values()
    source = dataclasses.replace(
        recipe,
        classes=None if "classes" in missing else recipe.classes,
        images=None if "images" in missing else recipe.images,
    )
    skipped = broken if recipe.on_broken == "skip" else None
    pair = tried(lambda: run_data(dataclasses.replace(source, val_data=None), skipped))
    data, val = pair or (None, None)
    if recipe.val_data:
        classes = None if data is None or isinstance(data, Captioned) else data.classes
        val = tried(lambda: validation_data(source, classes, skipped))
    if isinstance(data, Labelled | Masked):
        problems += _problems_of_classes(recipe, data)
    if isinstance(data, Labelled) and data.left_out:
        notes.append(
            f"note: left out {count_kinds(data.left_out)}; images are {', '.join(SUFFIXES)}"
        )
    if isinstance(data, Labelled) and not recipe.streaming:
        labelled = data
        notes += tried(lambda: _notes_of_labels(recipe, labelled)) or []
    if isinstance(data, Labelled) and recipe.shots is not None:
        data = few_shot(data, recipe.shots, recipe.seed)
    # of several processes, one looks
    if (
        images
        and os.environ.get("RANK", "0") == "0"
        and (recipe.images is None or recipe.images.is_dir())
    ):
        for part, spec in ((data, recipe.data), (val, recipe.val_data or "the share held out")):
            if part is not None:
                broken_here = broken_images(part, progress=progress)
                _report_broken(recipe, part, spec, broken_here, problems, notes)

    def segmented(part: Labelled | Captioned | Masked | None) -> Opened | None:
        if not isinstance(part, Masked):
            return part
        return tried(lambda: list_segments(part, recipe.mask_min_area, skipped, progress=progress))

    data_ = segmented(data)
    val_ = segmented(val)
    count = None if data_ is None or recipe.streaming else len(data_.rows)
    if count is not None:
        tried(lambda: recipe.resolved(count, int(os.environ.get("WORLD_SIZE", "1"))))
    if problems or data_ is None:
        raise all_of(list(dict.fromkeys(problems)), "the data of this run")
    return RunData(data_, val_, count, tuple(broken), tuple(notes))


def open_data(recipe: Recipe, base: Base) -> tuple[Data, Data | None]:
    """Open the data of a recipe without a look at the images, ready for a base.

    Raises:
        RAdapterError: as `open_run` does.
    """
    return open_run(recipe, images=False).ready(recipe, base)


def _missing(recipe: Recipe) -> dict[str, str]:
    """Files and folders of the recipe that are not there, by its field."""
    found: dict[str, str] = {}
    if (
        recipe.architecture.startswith(LOCAL)
        and not Path(recipe.architecture.removeprefix(LOCAL)).is_dir()
    ):
        found["architecture"] = (
            f"{recipe.architecture.removeprefix(LOCAL)} is no model folder; see --architecture"
        )
    if recipe.images is not None and not recipe.images.is_dir():
        found["images"] = f"there is no folder {recipe.images}; see --images"
    if (
        recipe.classes is not None
        and str(recipe.classes) != IMAGENET
        and not recipe.classes.is_file()
    ):
        found["classes"] = f"there is no class file {recipe.classes}; see --classes"
    if recipe.templates != "openai":
        try:
            read_templates(recipe.templates)
        except RAdapterError as error:
            found["templates"] = str(error)
    return found


def _problems_of_classes(recipe: Recipe, data: Labelled | Masked) -> list[str]:
    problems = []
    if len(data.classes) < 2:
        problems.append(
            f"{recipe.data} has the one class {data.classes[0]!r}; training tells classes apart, so"
            " it needs two"
        )
    same = [] if str(recipe.classes) == IMAGENET else equal_names(data)
    if same:
        problems.append(
            f"CLIP reads these classes of {recipe.data} as one, for their names differ in case,"
            " spaces and underscores alone; merge them, or give each a name of its own with"
            f" --classes FILE:{listed(same)}"
        )
    return problems


def _notes_of_labels(recipe: Recipe, data: Labelled) -> list[str]:
    """How many images have several labels, and whether some look as if they had."""
    if data.several:
        count = sum(len(labels) > 1 for labels in data.label_sets())
        return [f"note: {count:,} of {len(data.rows):,} images have several labels"]
    parted = [name for name in data.own if len(split_labels(name, ";")) > 1]
    if not parted:
        return []
    return [
        f"note: {len(parted)} class names of {recipe.data} hold a semicolon, such as {parted[0]!r};"
        " --label-separator ';' would read them as several labels"
    ]


def _report_broken(
    recipe: Recipe,
    data: Labelled | Captioned | Masked,
    spec: str,
    broken: list[str],
    problems: list[str],
    notes: list[str],
) -> None:
    """Add what is wrong with the images."""
    if not broken:
        return
    count = len(data.rows if isinstance(data, Labelled) else data.images)
    few = f"{len(broken):,} of {count:,} images of {spec} can't be read"
    if recipe.on_broken == "skip":
        if len(broken) == count:
            problems.append(
                f"not one of {count:,} images of {spec} can be read; the first: {broken[0]}"
            )
        else:
            notes.append(f"note: {few}, and are left out")
    elif len(broken) == 1:
        problems.append(f"{broken[0]}; mend it, or leave such images out with --on-broken skip")
    else:
        problems.append(
            f"{few}; mend them, or leave such images out with --on-broken skip:{listed(broken)}"
        )


def _ready(recipe: Recipe, base: Base, data: Opened) -> Data:
    from radapter_serve.clip.prompts import templates_of

    if isinstance(data, Captioned):
        return data
    templates = templates_of(recipe.templates)
    if isinstance(data, Labelled):
        return dataclasses.replace(data, templates=templates)
    return data.crops(recipe.mask_crop(base.preprocess["mean"]), templates)
