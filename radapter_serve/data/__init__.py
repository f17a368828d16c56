"""Data for training and judging: rows of images, their labels, their captions."""

from radapter_serve.data.labelled import Labelled, LabelledImages, evaluation_batches, load_labelled
from radapter_serve.data.rows import READERS, BrokenImage, ImageColumn, TrainingData, open_rows

__all__ = [
    "READERS",
    "BrokenImage",
    "ImageColumn",
    "Labelled",
    "LabelledImages",
    "TrainingData",
    "evaluation_batches",
    "load_labelled",
    "open_rows",
]
