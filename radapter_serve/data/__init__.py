"""Data for training and judging: rows of images, their labels, their captions, their masks."""

from radapter_serve.data.labelled import Labelled, LabelledImages, evaluation_batches, load_labelled
from radapter_serve.data.masks import IGNORE, Masked, MaskedImage, load_masked
from radapter_serve.data.rows import READERS, BrokenImage, ImageColumn, TrainingData, open_rows

__all__ = [
    "IGNORE",
    "READERS",
    "BrokenImage",
    "ImageColumn",
    "Labelled",
    "LabelledImages",
    "Masked",
    "MaskedImage",
    "TrainingData",
    "evaluation_batches",
    "load_labelled",
    "load_masked",
    "open_rows",
]
