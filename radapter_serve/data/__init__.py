"""Data for training and evaluation: rows of images with their labels, captions or masks.

It reads and checks; what is learned or measured from the data lives in `training/` and
`evaluation/`.
"""

from radapter_serve.data.captions import Captioned, CaptionedImage, load_captioned
from radapter_serve.data.classes import imagenet_classes, refuse_wordnet_ids
from radapter_serve.data.labelled import (
    Labelled,
    class_split,
    few_shot,
    load_labelled,
    split_classes,
)
from radapter_serve.data.masked import load_masked
from radapter_serve.data.masks import IGNORE, Masked, MaskedImage
from radapter_serve.data.rows import (
    READERS,
    BrokenImage,
    ImageColumn,
    LabelledImages,
    TrainingData,
    open_rows,
)
from radapter_serve.data.run_data import run_data, validation_data

__all__ = [
    "IGNORE",
    "READERS",
    "BrokenImage",
    "Captioned",
    "CaptionedImage",
    "ImageColumn",
    "Labelled",
    "LabelledImages",
    "Masked",
    "MaskedImage",
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
