"""Data for training and evaluation: rows of images with their labels, captions or masks.

It reads and checks; what is learned or measured from the data lives in `training/` and
`evaluation/`. The names below load on first use: `source`, which recipes and suites stand on, needs
no library of data sets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radapter_serve.data.captions import Captioned, CaptionedImage, load_captioned
    from radapter_serve.data.classes import imagenet_classes, refuse_wordnet_ids
    from radapter_serve.data.labelled import (
        Labelled,
        class_split,
        few_shot,
        load_labelled,
        split_classes,
    )
    from radapter_serve.data.masks import IGNORE, Masked, MaskedImage, load_masked
    from radapter_serve.data.rows import (
        READERS,
        BrokenImage,
        ImageColumn,
        LabelledImages,
        TrainingData,
        open_rows,
    )
    from radapter_serve.data.runs import run_data, validation_data
    from radapter_serve.data.source import DataSource, RunSource

__all__ = [
    "IGNORE",
    "READERS",
    "BrokenImage",
    "Captioned",
    "CaptionedImage",
    "DataSource",
    "ImageColumn",
    "Labelled",
    "LabelledImages",
    "Masked",
    "MaskedImage",
    "RunSource",
    "TrainingData",
    "class_split",
    "few_shot",
    "imagenet_classes",
    "load_captioned",
    "load_labelled",
    "load_masked",
    "open_rows",
    "refuse_wordnet_ids",
    "run_data",
    "split_classes",
    "validation_data",
]

_HOME = {
    "IGNORE": ".masks",
    "READERS": ".rows",
    "BrokenImage": ".rows",
    "Captioned": ".captions",
    "CaptionedImage": ".captions",
    "DataSource": ".source",
    "ImageColumn": ".rows",
    "Labelled": ".labelled",
    "LabelledImages": ".rows",
    "Masked": ".masks",
    "MaskedImage": ".masks",
    "RunSource": ".source",
    "TrainingData": ".rows",
    "class_split": ".labelled",
    "few_shot": ".labelled",
    "imagenet_classes": ".classes",
    "load_captioned": ".captions",
    "load_labelled": ".labelled",
    "load_masked": ".masks",
    "open_rows": ".rows",
    "refuse_wordnet_ids": ".classes",
    "run_data": ".runs",
    "split_classes": ".labelled",
    "validation_data": ".runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
