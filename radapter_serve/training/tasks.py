"""What a task brings to training: its data."""

from __future__ import annotations

import dataclasses

from radapter_serve.clip.base import Base
from radapter_serve.clip.prompts import templates_of
from radapter_serve.data import Captioned, Labelled, Masked, few_shot, run_data
from radapter_serve.data.segments import SegmentCrops, load_segments
from radapter_serve.errors import RAdapterError
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.training.recipe import Recipe

Data = Labelled | Captioned | SegmentCrops


def open_data(recipe: Recipe, base: Base, *, broken: list[str] | None = None) -> tuple[Data, Data | None]:
    """Open the data of a recipe, as its task reads it.

    Args:
        recipe: names the task, the data and its columns.
        base: whose mean fills what is outside a segment.
        broken: takes the names of rows that `on_broken: skip` leaves out.

    Returns:
        What to train with, and what to validate on: all of `val_data`, or `val_fraction` of the data, or nothing.

    Raises:
        RAdapterError: it can't be read, or is no data for this task.
    """
    broken = None if recipe.on_broken == "refuse" else broken
    data, val = run_data(recipe.to_dict(), broken)
    if not isinstance(data, Captioned) and len(data.classes) < 2:
        raise RAdapterError(
            f"{recipe.data} has the one class {data.classes[0]!r}; training tells classes apart, so it needs two"
        )
    if isinstance(data, Labelled) and recipe.shots is not None:
        data = few_shot(data, recipe.shots, recipe.seed)
    return _ready(recipe, base, data, broken), None if val is None else _ready(recipe, base, val, broken)


def _ready(recipe: Recipe, base: Base, data: Labelled | Captioned | Masked, broken: list[str] | None) -> Data:
    """The data with the recipe's templates; images with masks by their segments."""
    if isinstance(data, Captioned):
        return data
    templates = templates_of(recipe.templates)
    if isinstance(data, Labelled):
        return dataclasses.replace(data, templates=templates)
    crop = MaskCrop.from_recipe(recipe.to_dict(), base.preprocess["mean"])
    return load_segments(data, crop, min_area=recipe.mask_min_area, templates=templates, broken=broken)
