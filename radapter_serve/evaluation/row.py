"""A row of results: one model on one data set, and what was measured."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.errors import short
from radapter_serve.evaluation.intervals import Interval
from radapter_serve.typed import checker

_FIRST = (  # in a file: CLIP_benchmark's fields, and what else a reader looks for
    "dataset",
    "model",
    "pretrained",
    "task",
    "language",
    "source",
    "alpha",
    "shift",
    "split",
    "metric",
    "border",
    "exif_orientation",
)
_LAST = ("runtime", "suite", "seed", "version")
_WITH = {  # written as null, too, where the first is there; all other fields are left out then
    "source": ("model", "pretrained", "alpha"),
    "release": ("base_digest", "adapter_digest"),
    "dense": ("short_side", "stride", "threshold", "background"),
    "proposals": ("proposal_weight",),
}
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a row says about a model.

    Attributes:
        model, pretrained: as open_clip names them.
        precision: of its weights.
        base_digest, adapter_digest, weights_digest: of the files that it was made from.
        release: version of a release.
        quantization: of an int8 release, as its `release.json` has it.
    """

    model: str | None = None
    pretrained: str | None = None
    precision: str | None = None
    base_digest: str | None = None
    adapter_digest: str | None = None
    release: int | None = None
    weights_digest: str | None = None
    quantization: Mapping[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What a row says about a data set.

    Attributes:
        n: images.
        classes: their number.
        captions: their number, and how many of them differ, where some are equal.
        different_captions: see `captions`.
        class_split: `base` or `novel`; None where all classes are used.
        classes_digest: of the names of the classes of masks.
        set_digest: of everything that the figures depend on.
    """

    n: int
    classes: int | None = None
    captions: int | None = None
    different_captions: int | None = None
    class_split: str | None = None
    classes_digest: str | None = None
    set_digest: str


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is evaluated on a data set.

    Attributes:
        dense, short_side, stride, refine, threshold, background, proposals, proposal_weight: of
            segmentation, as in `Entry`; sizes are written out.
        size: of segmentation, side of the image encoder's input in pixels.
        crop: how the masks of proposals are shown.
        templates: of prompts; None where there are none.
    """

    dense: str | None = None
    size: int | None = None
    short_side: int | None = None
    stride: int | None = None
    refine: int | None = None
    threshold: float | None = None
    background: str | None = None
    crop: MaskCrop | None = None
    proposals: str | None = None
    proposal_weight: float | None = None
    templates: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ClassFigures:
    """Of one class: its first name, number of cases, and figures in [0, 1]; None without a case.

    Attributes:
        recall: of images with one label, and of pixels.
        iou: of pixels.
        average_precision: of images with several labels.
    """

    name: str
    n: int
    recall: float | None
    iou: float | None = None
    average_precision: float | None = None

    __pydantic_config__: ClassVar[Mapping[str, object]] = {
        **_STRICT,
        "alias_generator": lambda name: "class" if name == "name" else name,
    }


@dataclass(frozen=True)
class Bin:
    """Of the images of one bin of confidence: their number, mean confidence and accuracy in [0,
    1].
    """

    n: int
    confidence: float | None
    accuracy: float | None

    __pydantic_config__: ClassVar[Mapping[str, object]] = _STRICT


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one model on one data set.

    Attributes:
        metrics: shares in [0, 1] by name. Of whole images with classes also `kept`, where alpha 0
            is among the models: the share of images whose best noun is the one that alpha 0 finds,
            among some hundred common ones that are no class of the set.
        intervals: the two ends of the 95 % interval of each.
        calibration: of whole images with classes, by bin of confidence.
        per_class: of each class.
        confusion: of few classes, cases by true and found class.
        indistinguishable: pairs of labels that the model can't tell apart; None where there are
            none.
        right: of the row's own metric, where it is a mean over images: whether each image is right,
            one bit an image in base64; of images that captions find, how many of its captions find
            each image.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval] | None = None
    calibration: list[Bin] | None = None
    per_class: list[ClassFigures] | None = None
    confusion: list[list[int]] | None = None
    indistinguishable: list[tuple[str, str]] | None = None
    right: str | list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Case(Setup, SetFacts, ModelFacts):
    """One model on one data set: what identifies a row.

    Attributes:
        dataset: name of the data set.
        task: as CLIP_benchmark names it.
        language, shift, split, metric, border, exif_orientation: as in `Entry`.
        source, alpha: as in `Variant`.
        suite: name of the suite.
        seed: of the draw of images.
        version: of this package.
    """

    dataset: str
    task: str
    language: str = "en"
    source: str
    alpha: float | None
    shift: str
    split: str
    metric: str
    border: int = 0
    exif_orientation: bool = True
    suite: str | None = None
    seed: int | None = None
    version: str | None = None

    @property
    def identity(self) -> str:
        """Equal for the rows of one case, however they were measured."""
        measured = {field.name for field in fields(Measured)} | {"runtime"}
        values = {name: of for name, of in self.to_dict().items() if name not in measured}
        return json.dumps(values, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """As a line of `results.jsonl` has it."""
        names = [field.name for field in fields(self)]
        middle = [name for name in names if name not in _FIRST + _LAST]
        last = [name for name in _LAST if name in names]
        values = {name: getattr(self, name) for name in (*_FIRST, *middle, *last)}
        nulls = {name for key, names in _WITH.items() if values[key] is not None for name in names}
        for name, usual in (("border", 0), ("exif_orientation", True)):
            if values[name] == usual:
                del values[name]
        return {name: _plain(of) for name, of in values.items() if of is not None or name in nulls}


@dataclass(frozen=True, kw_only=True)
class Row(Measured, Case):
    """A case, and what was measured: CLIP_benchmark's schema and more.

    Attributes:
        runtime: seconds of embedding and scoring, without reading and decoding.
    """

    runtime: float

    __pydantic_config__: ClassVar[Mapping[str, object]] = _STRICT

    @property
    def per_image(self) -> NDArray[np.float64] | None:
        """What each image adds to the row's own metric, [n], whose mean is the metric; None where
        the metric is no mean over images.

        Raises:
            ValueError: `right` has not as many images as the row.
        """
        return None if self.right is None else unpacked(self.right, self.n, self.captions)

    def to_dict(self) -> dict[str, Any]:
        """As a line of `results.jsonl` has it."""
        values = super().to_dict()
        if self.per_class is not None:
            kind = "recall"
            if self.metric == "mean_average_precision":
                kind = "average_precision"
            elif self.dense is not None:
                kind = "iou"
            values["per_class"] = [_of_class(figures, kind) for figures in self.per_class]
        return values

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read what `to_dict` gave, as JSON.

        Raises:
            ValueError: it is no JSON; a field is unknown, missing or of another type.
        """
        from pydantic import ValidationError  # which a client has not

        try:
            row = checker(cls).validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        else:
            _ = row.per_image  # which refuses what is no result of each image
            return row
        place = short(".".join(map(str, first["loc"])))
        if first["type"] == "missing":
            raise ValueError(f"it has no {place}")
        if first["type"] == "unexpected_keyword_argument":
            raise ValueError(f"it has an unknown field {place}")
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"])


def packed(right: NDArray[np.bool_]) -> str:
    """`right` of a row, from whether each image is right, [n]."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(right: str | list[int], n: int, captions: int | None) -> NDArray[np.float64]:
    """What each image adds to a row's metric, from the row's `right`, `n` and `captions`.

    Raises:
        ValueError: `right` has not as many images as the row.
    """
    if isinstance(right, str):
        data = base64.b64decode(right, validate=True)
        if len(data) != (n + 7) // 8:
            raise ValueError(f"right should have a bit for each of {n} images")
        return np.unpackbits(np.frombuffer(data, np.uint8), count=n).astype(np.float64)
    if len(right) != n:
        raise ValueError(f"right should have a number for each of {n} images")
    return np.array(right) * (n / (captions or n))


def _plain(value: Any) -> Any:
    if isinstance(value, MaskCrop):
        return value.to_dict()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, list) and value and isinstance(value[0], Bin):
        return [asdict(of) for of in value]
    return value


def _of_class(figures: ClassFigures, kind: str) -> dict[str, Any]:
    values = {"class": figures.name, "n": figures.n, "recall": figures.recall}
    return values if kind == "recall" else {**values, kind: getattr(figures, kind)}
