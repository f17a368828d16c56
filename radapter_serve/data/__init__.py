"""Data for training and judging: rows of images, their labels, their captions, their masks."""

from radapter_serve.data.captions import Captioned, CaptionedImage, load_captioned
from radapter_serve.data.classes import imagenet_classes, refuse_wordnet_ids
from radapter_serve.data.labelled import (
    Labelled,
    class_split,
    evaluation_batches,
    few_shot,
    load_labelled,
    split_classes,
)
from radapter_serve.data.masks import IGNORE, Masked, MaskedImage, load_masked
from radapter_serve.data.rows import READERS, BrokenImage, ImageColumn, LabelledImages, TrainingData, open_rows

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
    "evaluation_batches",
    "few_shot",
    "imagenet_classes",
    "load_captioned",
    "load_labelled",
    "load_masked",
    "open_rows",
    "refuse_wordnet_ids",
    "split_classes",
]
