"""What a task brings to training: its data."""

from __future__ import annotations

from radapter_serve.clip.base import Base
from radapter_serve.clip.prompts import templates_of
from radapter_serve.data import Captioned, Labelled, class_split, few_shot, load_captioned, load_labelled, load_masked
from radapter_serve.data.segments import Segments, load_segments
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.training.recipe import Recipe


def open_data(
    recipe: Recipe, base: Base, *, validation: bool = False, broken: list[str] | None = None
) -> Labelled | Captioned | Segments:
    """Open the data of a recipe, as its task reads it.

    Args:
        recipe: names the task, the data and its columns.
        base: whose mean fills what is outside a segment.
        validation: open `val_data` rather than `data`: all of its images, and no stream.
        broken: takes the names of rows that `on_broken: skip` leaves out.

    Raises:
        RAdapterError: it can't be read, or is no data for this task.
    """
    spec, streaming = (recipe.val_data or "", False) if validation else (recipe.data, recipe.streaming)
    if recipe.on_broken == "refuse":
        broken = None
    if recipe.task == "segmentation":
        return load_segments(
            load_masked(spec, classes=recipe.classes, images=recipe.images),
            MaskCrop.from_recipe(recipe.to_dict(), base.preprocess["mean"]),
            min_area=recipe.mask_min_area,
            templates=templates_of(recipe.templates),
            broken=broken,
        )
    if recipe.task == "retrieval":
        return load_captioned(
            spec,
            image_column=recipe.image_column,
            caption_column=recipe.caption_column,
            captions_per_image=1 if validation else recipe.captions_per_image,
            images=recipe.images,
            streaming=streaming,
            broken=broken,
        )
    data = load_labelled(
        spec,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        classes=recipe.classes,
        templates=templates_of(recipe.templates),
        images=recipe.images,
        streaming=streaming,
    )
    data = class_split(data, recipe.class_split)
    return data if validation or recipe.shots is None else few_shot(data, recipe.shots, recipe.seed)
