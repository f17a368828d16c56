"""The data of a run, opened as its recipe says, so that training and later evaluation see the same
validation data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from radapter_serve.data.captions import Captioned, load_captioned
from radapter_serve.data.classes import refuse_wordnet_ids
from radapter_serve.data.labelled import Labelled, class_split, load_labelled
from radapter_serve.data.masked import load_masked
from radapter_serve.data.masks import Masked
from radapter_serve.errors import RAdapterError

Images = Labelled | Captioned | Masked


def run_data(
    recipe: Mapping[str, Any], broken: list[str] | None = None
) -> tuple[Images, Images | None]:
    """Open the data that a run trains with, and the data that it is validated on.

    Args:
        recipe: the fields of a recipe by name; one that is missing has its default.
        broken: takes the names of rows that `on_broken: skip` leaves out.

    Returns:
        The data without the share that is held out, and `val_data`, that share, or None.

    Raises:
        RAdapterError: it can't be read, or is no data for the recipe's task.
    """
    data, held = _open(recipe, recipe["data"], broken, training=True), None
    if recipe.get("val_data"):
        held = validation_data(
            recipe, None if isinstance(data, Captioned) else data.classes, broken
        )
    elif recipe.get("val_fraction"):
        data, held = data.held_out(recipe["val_fraction"], recipe.get("seed", 0))
    return data, (
        dataclasses.replace(held, captions_per_image=1) if isinstance(held, Captioned) else held
    )


def validation_data(
    recipe: Mapping[str, Any], classes: Sequence[str] | None, broken: list[str] | None = None
) -> Images | None:
    """Open the data that a run is validated on: all of `val_data`, or the share of the data that
    training held out.

    Args:
        recipe, broken: as of `run_data`.
        classes: the run's, in their order. Each image is classified among all of them, whether or
            not the data has an image of each; further classes of labelled images follow them, and
            those of masks must be the same. None takes the data's own.

    Returns:
        The data, or None where the recipe has none.

    Raises:
        RAdapterError: it can't be read, or is no data for the recipe's task.
    """
    val = (
        _open(recipe, recipe["val_data"], broken)
        if recipe.get("val_data")
        else run_data(recipe, broken)[1]
    )
    if isinstance(val, Labelled) and classes is not None:
        return val.among(classes, alone=recipe.get("class_split", "all") != "all")
    if isinstance(val, Masked) and classes is not None:
        _check_classes(val.classes, classes, recipe.get("val_data") or recipe["data"])
    return val


def _check_classes(own: Sequence[str], classes: Sequence[str], place: str) -> None:
    for entries, others, has, lacks in (
        (own, classes, place, "the run"),
        (classes, own, "the run", place),
    ):
        if more := [entry for entry in entries if entry not in others]:
            raise RAdapterError(
                f"{has} has the class {more[0]!r}, which {lacks} has not ({len(more)} of"
                f" {len(entries)}); name one class file for both, with --classes FILE"
            )


def _open(
    recipe: Mapping[str, Any], spec: str, broken: list[str] | None, *, training: bool = False
) -> Images:
    task, turn = recipe.get("task", "classification"), recipe.get("exif_orientation", True)
    images, classes = (
        Path(recipe[name]) if recipe.get(name) else None for name in ("images", "classes")
    )
    if task == "segmentation":
        return load_masked(spec, classes=classes, images=images, exif_orientation=turn)
    streaming = training and recipe.get("streaming", False) and not recipe.get("val_fraction")
    columns = {
        "image_column": recipe.get("image_column", "image"),
        "images": images,
        "streaming": streaming,
    }
    data: Labelled | Captioned
    if task == "retrieval":
        data = load_captioned(
            spec,
            **columns,
            caption_column=recipe.get("caption_column", "caption"),
            captions_per_image=recipe.get("captions_per_image", 1) if training else 1,
            broken=broken if recipe.get("on_broken") == "skip" else None,
        )
    else:
        data = load_labelled(
            spec,
            **columns,
            label_column=recipe.get("label_column", "label"),
            classes=classes,
            every_class=training,
        )
        if classes is None:
            refuse_wordnet_ids(data.own)
        data = class_split(data, recipe.get("class_split", "all")) if training else data
    data.exif_orientation = turn
    return data
