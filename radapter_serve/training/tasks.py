"""What a task brings to training: its data."""

from __future__ import annotations

import dataclasses

from radapter_serve.clip.base import Base
from radapter_serve.clip.prompts import templates_of
from radapter_serve.data import (
    Captioned,
    Labelled,
    class_split,
    few_shot,
    load_captioned,
    load_labelled,
    load_masked,
    refuse_wordnet_ids,
)
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
    data, val = _open(recipe, base, recipe.data, broken, streaming=recipe.streaming), None
    if not isinstance(data, Captioned) and len(data.classes) < 2:
        raise RAdapterError(
            f"{recipe.data} has the one class {data.classes[0]!r}; training tells classes apart, so it needs two"
        )
    if recipe.val_data:
        val = _open(recipe, base, recipe.val_data, broken)
    elif recipe.val_fraction:
        data, val = data.held_out(recipe.val_fraction, recipe.seed)
    if isinstance(val, Captioned):
        val = dataclasses.replace(val, captions_per_image=1)
    if isinstance(data, Labelled) and recipe.shots is not None:
        data = few_shot(data, recipe.shots, recipe.seed)
    return data, val


def _open(recipe: Recipe, base: Base, spec: str, broken: list[str] | None, *, streaming: bool = False) -> Data:
    if recipe.task == "segmentation":
        return load_segments(
            load_masked(spec, classes=recipe.classes, images=recipe.images, exif_orientation=recipe.exif_orientation),
            MaskCrop.from_recipe(recipe.to_dict(), base.preprocess["mean"]),
            min_area=recipe.mask_min_area,
            templates=templates_of(recipe.templates),
            broken=broken,
        )
    if recipe.task == "retrieval":
        captioned = load_captioned(
            spec,
            image_column=recipe.image_column,
            caption_column=recipe.caption_column,
            captions_per_image=recipe.captions_per_image if spec == recipe.data else 1,
            images=recipe.images,
            streaming=streaming,
            broken=broken,
        )
        captioned.exif_orientation = recipe.exif_orientation
        return captioned
    data = load_labelled(
        spec,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        classes=recipe.classes,
        templates=templates_of(recipe.templates),
        images=recipe.images,
        streaming=streaming,
    )
    data.exif_orientation = recipe.exif_orientation
    if recipe.classes is None:
        refuse_wordnet_ids(data.own)
    return class_split(data, recipe.class_split)
