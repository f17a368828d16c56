"""Data sources: the place of images, and how to read them.

Recipes and entries of suites are data sources, and the recipe of an adapter file is read into one,
so each field is declared once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BeforeValidator, Field, ValidationError

from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.errors import RAdapterError, short
from radapter_serve.files import checker

T = TypeVar("T")


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    return value


INDEX = "index"  # the reader of an index, whose images are embedded already

# YAML reads 5e-4 as text, which is a number here, and `true` as a bool, which is not, although
# Python counts it as 1.
Real = Annotated[float, BeforeValidator(_no_truth), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
PartShare = Annotated[Real, Field(ge=0, lt=1)]  # less than the whole
Number = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]


def with_reader(source: str) -> str:
    """Add the reader `imagefolder:` to a bare folder; other sources are returned as they are."""
    with contextlib.suppress(OSError):  # for a name that is too long
        if source and ":" not in source and Path(source).is_dir():
            return f"imagefolder:{source}"
    return source


class For:
    """Marks a field that only these tasks use."""

    def __init__(self, *tasks: str) -> None:
        self.tasks = tasks


@functools.cache
def users(kind: type) -> Mapping[str, tuple[str, ...]]:
    """The tasks that use each field of a dataclass; fields that all tasks use are left out."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: mark.tasks
        for name, hint in hints.items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, For)
    }


def read_fields(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """Make a dataclass of data sources from the values of its fields; `what` names them in errors,
    which tell all that is wrong.
    """
    allowed = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted({short(name) for name in values if name not in allowed})
    if unknown:
        raise RAdapterError(
            f"{what} has unknown fields {', '.join(unknown)[:200]}; allowed: {', '.join(allowed)}"
        )
    try:
        return checker(kind).validate_python(values)
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for problem in error.errors():  # a field of two types has errors for both
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "it should be")
            name = str(problem["loc"][0])
            if problem["type"] == "literal_error" and name in wrong:  # or one of these words
                wrong[name] += f", or {problem['ctx']['expected']}"
            wrong.setdefault(name, f"{name} is {reprlib.repr(problem['input'])}; {message}")
        raise RAdapterError(f"{what} is invalid: {'; '.join(wrong.values())}") from None


@dataclass(frozen=True)
class DataSource:
    """Images with labels, captions or masks: their place, and how to read them.

    Attributes:
        data: training data: imagefolder:DIR, csv:FILE, parquet:FILE, webdataset:FILE, json:FILE or
            the name of a data set on the Hugging Face hub; @SPLIT at the end names a split, train
            by default. coop:FILE and karpathy:FILE are published splits and need one, or several as
            in @train+restval. index:DIR has the embeddings of an index, for adapters on a
            projection. For segmentation masks:DIR (DIR/images/* and the label maps
            DIR/masks/*.png) or coco:FILE.json (panoptic or instance annotations).
        task: task to train for: classification (images with labels), retrieval (images with
            captions) or segmentation (images with masks).
        image_column: column of the images (paths, bytes or images).
        label_column: column of the labels (class names or numbers, or lists of them).
        label_separator: separator of several labels in one text of the label column, such as ";";
            none takes the whole text as one label.
        caption_column: column of the captions, one text or a list of texts; rows of the same image
            belong together.
        images: folder of the images, if their paths in the data are relative to another place.
        classes: file with one class a line: `folder: name for prompts, synonym, ...`, or the name
            alone if the folder has the same name; `imagenet` for CLIP's names of ImageNet's
            classes; none takes the names in the data set, with spaces for underscores. For
            segmentation one name a line, the first is id 0; or JSON or YAML that maps id to name.
        class_split: base or novel, the first or second half of the classes, for training and
            validation; all takes all.
        exif_orientation: rotate images upright according to their EXIF orientation; false keeps the
            pixels of the file, as open_clip does. An export of this adapter does the same.
    """

    data: str = ""
    task: Literal["classification", "retrieval", "segmentation"] = "classification"
    image_column: Annotated[str, For("classification", "retrieval")] = "image"
    label_column: Annotated[str, For("classification")] = "label"
    label_separator: Annotated[str | None, Field(min_length=1), For("classification")] = None
    caption_column: Annotated[str, For("retrieval")] = "caption"
    images: Path | None = None
    classes: Annotated[Path | None, For("classification", "segmentation")] = None
    class_split: Annotated[Literal["all", "base", "novel"], For("classification")] = "all"
    exif_orientation: bool = True


@dataclass(frozen=True)
class RunSource(DataSource):
    """The training and validation data of a run.

    Attributes:
        val_data: validation data, in the same forms; none skips validation.
        val_fraction: fraction of the training images (of each class, if there are classes) to hold
            out for validation, drawn with the seed; instead of val_data. 0 holds out no images.
        captions_per_image: captions of an image in the same batch, each a positive of the image;
            with 1, captions of one image share a batch only by chance.
        templates: file with one prompt template a line ({} is the class); or `simple`, `openai` for
            the 80 of OpenAI, `vild` for the 63 of ViLD, or `ovseg`.
        shots: images of each class to train with, drawn with the seed (a class with fewer gives
            all); none takes all.
        on_broken: on a broken or missing image, skip takes the next image and counts it, refuse
            stops the run.
        mask_padding: border around the box of a segment on each side, as a fraction of its longer
            side; it is filled like everything outside the segment, so a wider border only makes the
            segment smaller.
        mask_square: keep the aspect ratio of a segment, with its box extended to a square; false
            stretches the box, as OVSeg does.
        mask_min_area: smallest segment that is used, in pixels; 1024, COCO's limit of small
            objects, is 32 x 32.
        dense: method to embed patches for dense prediction in an export of this adapter; none
            exports without dense prediction.
        seed: seed of order, augmentation, prompts, adapter dropping and initial values, and of the
            draws of val_fraction and shots.
    """

    val_data: str | None = None
    val_fraction: PartShare = 0.0
    captions_per_image: Annotated[Count, For("retrieval")] = 1
    templates: str = "simple"
    shots: Annotated[Count | None, For("classification")] = None
    on_broken: Literal["skip", "refuse"] = "refuse"
    mask_padding: Share = 0.0
    mask_square: bool = True
    mask_min_area: Annotated[Count, For("segmentation")] = 1024
    dense: Literal["none", "maskclip", "naclip"] = "none"
    seed: Annotated[Number, Field(lt=2**31)] = 0

    @classmethod
    def from_json(cls, recipe: Mapping[str, Any], task: str) -> RunSource:
        """Read the recipe of an adapter file; its other fields are ignored, and missing fields have
        their defaults. A wrong value raises pydantic's `ValidationError`.
        """
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in recipe.items() if name in names}
        text = json.dumps({**values, "task": task})
        return checker(cls).validate_json(text, strict=True)

    def mask_crop(self, mean: Sequence[float]) -> MaskCrop:
        """The crop of a segment; `mean` is the RGB in [0, 1] that the encoder subtracts."""
        return MaskCrop.filled_with(mean, padding=self.mask_padding, square=self.mask_square)
