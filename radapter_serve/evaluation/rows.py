"""Rows of results, one for each model and data set; their file, tables and notes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from radapter_serve.contract.labels import SAME
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import Interval
from radapter_serve.files import checker, first_problem, write_text
from radapter_serve.release.release import Quantization

FILE = "results.jsonl"
KEPT_METRIC = "kept"  # name of a metric; see `Row`
# What a fraction of the base's answers means for labels and searches that were not trained; the
# figures behind these bounds are in docs/choose-alpha.md.
KEPT_WELL = 0.8  # from here on no loss was measured
LOST_MUCH = 0.5  # below this much of it was lost
_STRICT = {"extra": "forbid"}
_MEASURED = (
    "metrics",
    "intervals",
    "per_class",
    "confusion",
    "indistinguishable",
    "right",
    "runtime",
)


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class, in [0, 1]; None if it has no images."""

    name: str  # without synonyms
    n: int  # images, or pixels
    recall: float | None = None  # of images with one label, or of pixels
    iou: float | None = None  # of pixels
    average_precision: float | None = None  # of images with several labels

    __pydantic_config__: ClassVar[Mapping[str, object]] = {
        **_STRICT,
        "alias_generator": lambda name: "class" if name == "name" else name,
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """The results of one model on one data set: CLIP_benchmark's schema, without
    the language, and more.

    Attributes:
        dataset: name of the data set.
        model, pretrained: as open_clip names them.
        task: as CLIP_benchmark names it.
        shift, split, metric, border, exif_orientation: as in a suite.
        source: `adapter`, `checkpoint`, `lora`, `merged`, `release` or `server`.
        alpha: α in [0, 1]; None if unknown.
        precision: precision of the model's weights.
        base_digest, adapter_digest, weights_digest: digests of the files that the model was made
            from.
        release: version of a release.
        adapter: name of an adapter beside the release.
        quantization: how an int8 release finds its ranges.
        n: number of images.
        classes: number of classes.
        captions, different_captions: number of captions, and of different captions if some are
            equal.
        class_split: `base` or `novel`; None if all classes are used.
        classes_digest: digest of the names of the classes of masks.
        set_digest: digest of all data that the metrics depend on.
        dense, short_side, stride, refine, threshold, background, proposals, proposal_weight:
            settings of segmentation, as in a suite, with default sizes filled in.
        size: for segmentation, the side of the image encoder's input in pixels.
        crop: how the masks of proposals are cropped.
        templates: prompt templates; None if there are no prompts.
        metrics: figures in [0, 1] by name. Classification also has `kept`, if the base is known:
            the fraction of images for which the model and alpha 0 choose the same one of some
            hundred common nouns that are not classes of the set.
        intervals: the two ends of each metric's 95 % interval.
        per_class: figures of each class.
        confusion: cases by true and answered class, if the classes are few.
        indistinguishable: pairs of labels that the model can't tell apart.
        right: results of each image, if the row's metric is a mean over images: whether the image
            is right, one bit an image in base64; for image retrieval, how many of its captions find
            the image.
        runtime: seconds of embedding and scoring, without reading and decoding.
        suite: name of the suite.
        seed: seed of the draw of images.
        version: version of this package.
    """

    dataset: str
    model: str | None = None
    pretrained: str | None = None
    precision: str | None = None
    base_digest: str | None = None
    adapter_digest: str | None = None
    release: int | None = None
    adapter: str | None = None
    weights_digest: str | None = None
    quantization: Quantization | None = None
    task: str
    source: str
    alpha: float | None
    shift: str
    split: str
    metric: str
    border: int = 0
    exif_orientation: bool = True
    n: int
    classes: int | None = None
    captions: int | None = None
    different_captions: int | None = None
    class_split: str | None = None
    classes_digest: str | None = None
    set_digest: str
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
    metrics: dict[str, float]
    intervals: dict[str, Interval] | None = None
    per_class: list[ClassFigures] | None = None
    confusion: list[list[int]] | None = None
    indistinguishable: list[tuple[str, str]] | None = None
    right: str | list[int] | None = None
    runtime: float
    suite: str | None = None
    seed: int | None = None
    version: str | None = None

    __pydantic_config__: ClassVar[Mapping[str, object]] = _STRICT

    @property
    def identity(self) -> str:
        """A key that is equal for rows of the same model, data set and settings."""
        values = self.to_dict()
        known = {name: value for name, value in values.items() if name not in _MEASURED}
        return json.dumps(known, sort_keys=True)

    @property
    def per_image(self) -> NDArray[np.float64] | None:
        """Result of each image, [n], whose mean is the row's metric; None if the metric is not a
        mean over images.
        """
        return None if self.right is None else unpacked(self.right, self.n, self.captions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a line of `results.jsonl`; unknown values are left out, except α."""
        values = checker(Row).dump_python(self, mode="json", by_alias=True, exclude_none=True)
        return {"alpha": self.alpha, **values}

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read the JSON of `to_dict`; anything else raises a ValueError."""
        from pydantic import ValidationError  # not installed for a client

        try:
            row = checker(cls).validate_json(line)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None
        _ = row.per_image  # raises if `right` has another length than `n`
        return row


def packed(right: NDArray[np.bool_]) -> str:
    """Encode whether each image is right, [n], as `right` of a row."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(right: str | list[int], n: int, captions: int | None) -> NDArray[np.float64]:
    """Result of each image from a row's `right`; a ValueError if its length is not `n`."""
    if isinstance(right, str):
        data = base64.b64decode(right, validate=True)
        if len(data) != (n + 7) // 8:
            raise ValueError(f"right should have a bit for each of {n} images")
        return np.unpackbits(np.frombuffer(data, np.uint8), count=n).astype(np.float64)
    if len(right) != n:
        raise ValueError(f"right should have a number for each of {n} images")
    return np.array(right) * (n / (captions or n))


class Results:
    """The file `results.jsonl` in a folder, complete after each `add`; the first replaces the rows
    of an existing file unless `resume` keeps them.
    """

    def __init__(self, folder: str | Path, *, resume: bool = True) -> None:
        self.path = Path(folder) / FILE
        self.measured = 0  # number of rows added by this object
        self._rows: dict[str, Row] = {}  # by their identity
        for place in (Path(folder), *Path(folder).parents):
            if place.exists() and not place.is_dir():
                raise RAdapterError(
                    f"{place} is not a folder; name another place for the results with --out"
                )
        if not (resume and self.path.exists()):
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = Row.from_json(line)
            except ValueError as error:
                raise RAdapterError(
                    f"{self.path}, line {number} is not a row of results: {error}; move the file"
                    " away"
                ) from error
            self._rows[row.identity] = row

    @property
    def rows(self) -> list[Row]:
        """All rows, the newest last."""
        return list(self._rows.values())

    def find(self, row: Row) -> Row | None:
        """The stored row of the same model, data set and settings; None if there is no such row."""
        return self._rows.get(row.identity)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, replacing rows of the same identity, and write the file."""
        for row in rows:
            self._rows.pop(row.identity, None)
            self._rows[row.identity] = row
            self.measured += 1
        lines = "".join(f"{json.dumps(row.to_dict(), ensure_ascii=False)}\n" for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, lines)


def own_metric(row: Any) -> float:
    """The value of the row's own metric, in per cent."""
    return float(100 * row.metrics[row.metric])


def what_is_kept(alpha: float, share: float) -> str:
    """A sentence about the fraction of the base's answers that an α keeps, in [0, 1]."""
    if share >= KEPT_WELL:
        grade = "no loss of labels and searches that you did not train is to be expected"
    elif share >= LOST_MUCH:
        grade = "some loss of labels and searches that you did not train is to be expected"
    else:
        grade = "much is lost of labels and searches that you did not train"
    advice = ""
    if share < KEPT_WELL:
        advice = "; a smaller alpha keeps more, and so do a lower learning rate and more --preserve"
    return (
        f"alpha {alpha:g} keeps {100 * share:.1f} % of what the base answers among common nouns:"
        f" {grade}{advice}."
    )


def hardly_known(accuracies: Mapping[float, float], classes: int) -> list[str]:
    """A sentence if, of accuracies in [0, 1] by α, that of the base is below twice chance and below
    a quarter of the way from chance to 1, and an adapter on a projection gains less than a quarter
    of what the base lacks: then the towers have to learn.
    """
    chance = 1 / classes
    base = accuracies.get(0.0, 1.0)
    best = max((score for alpha, score in accuracies.items() if alpha), default=1.0)
    known = base >= min(2 * chance, chance + (1 - chance) / 4)
    if known or best - base >= (1 - base) / 4:
        return []
    return [
        f"the base has {100 * base:.1f} % of the images of {classes} classes right, guesses have"
        f" {100 * chance:.1f} %, and the adapter {100 * best:.1f} %: the base barely knows these"
        " images, and an adapter on a projection learns no features. Train the towers with"
        " radapter-train --recipe small."
    ]


def kept_notes(rows: Iterable[Row]) -> list[str]:
    """A sentence for each α of these rows that keeps less than `KEPT_WELL`."""
    of_alpha: dict[float, list[Row]] = {}
    for row in rows:
        if row.alpha is not None:
            of_alpha.setdefault(row.alpha, []).append(row)
    shares = {alpha: mean_kept(at_alpha) for alpha, at_alpha in sorted(of_alpha.items())}
    return [
        what_is_kept(alpha, share / 100)
        for alpha, share in shares.items()
        if share is not None and share < 100 * KEPT_WELL
    ]


def mean_kept(rows: Iterable[Row]) -> float | None:
    """The mean of `kept` over the data sets that have it, in per cent; None without such sets."""
    shares = [100 * row.metrics[KEPT_METRIC] for row in rows if KEPT_METRIC in row.metrics]
    return fmean(shares) if shares else None


def by_shift(sets: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the in-distribution data sets, and of the data sets whose `shift` is `ood`."""
    ids = [name for name, data in sets.items() if data.shift == "id"]
    return ids, [name for name, data in sets.items() if data.shift == "ood"]


def display_name(source: str, alpha: float | None, joint: str = " at alpha ") -> str:
    """A model's name in messages and pictures."""
    return source if alpha is None else f"{source}{joint}{alpha:g}"


def metric_name(metric: str) -> str:
    """A metric's name in papers: `mIoU`, `image R@1` (images found by a text), ..."""
    names = {
        "miou": "mIoU",
        "pixel_accuracy": "pixel acc",
        "mean_class_accuracy": "mean acc",
        "mean_average_precision": "mAP",
    }
    return names.get(metric, metric.replace("_retrieval_recall", " R"))


def table(rows: Sequence[Row], title: str, pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Table of models by data sets, in per cent, with intervals, and with means over sets of one
    kind and over `pairs` of base and novel classes.
    """
    # Columns: data sets, in distribution first; means over sets of one kind.
    sets = {row.dataset: row for row in sorted(rows, key=lambda row: row.shift)}
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, row in sets.items():
        # Dense segmentation, true masks and masks of a network are never averaged.
        kind = (row.shift, row.metric, row.dense, row.proposals is None, row.background is None)
        kinds.setdefault(kind, []).append(name)
    means = [names for names in kinds.values() if len(names) > 1]
    out = Table(title=title)
    out.add_column("model")
    out.add_column("α", justify="right")
    for name, row in sets.items():
        head = f"{name}\n{metric_name(row.metric)}, {row.shift}\nn {row.n}"
        out.add_column(head, justify="right", overflow="fold")
    has_kept = any(KEPT_METRIC in row.metrics for row in rows)
    for names in means:
        first = sets[names[0]]
        out.add_column(f"mean of\n{len(names)} {first.shift}\n{first.dense or ''}", justify="right")
    if pairs:
        out.add_column("H\nbase,\nnovel", justify="right")
    if has_kept:
        out.add_column("kept of\nthe base", justify="right")

    # Rows: one for each model. A mean needs the model's results on all of its sets.
    models: dict[tuple[str, float | None], dict[str, Row]] = {}
    for row in rows:
        models.setdefault((row.source, row.alpha), {})[row.dataset] = row
    for (source, alpha), of_set in models.items():
        figures = [_mean_of(of_set, names) for names in means]
        if pairs:
            halves = [_mean_of(of_set, names) for names in zip(*pairs, strict=True)]
            known = [half for half in halves if half is not None]
            figures.append(harmonic_mean(known) if len(known) == len(halves) else None)
        if has_kept:
            figures.append(mean_kept(of_set.values()))
        cells = []
        for name in sets:
            lines = []
            if name in of_set:
                row = of_set[name]
                lines.append(f"{own_metric(row):.2f}")
                interval = (row.intervals or {}).get(row.metric)
                if interval is not None:
                    lines.append(f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}")
                if "ece" in row.metrics:
                    lines.append(f"ECE {100 * row.metrics['ece']:.1f}")
            cells.append("\n".join(lines))
        cells += ["" if value is None else f"{value:.2f}" for value in figures]
        out.add_row(source, "" if alpha is None else f"{alpha:g}", *cells)
    return out


def _mean_of(of_set: Mapping[str, Row], names: Sequence[str]) -> float | None:
    figures = [own_metric(of_set[name]) for name in names if name in of_set]
    return fmean(figures) if len(figures) == len(names) else None


def prompts(rows: Sequence[Row]) -> list[str]:
    """One line for each list of prompt templates, with the data sets that use it."""
    sets: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        if row.templates:
            sets.setdefault(row.templates, {})[row.dataset] = None
    return [
        f"prompts of {', '.join(names)}: {templates[0]!r}"
        + (f" to {templates[-1]!r}, {len(templates)} templates" if len(templates) > 1 else "")
        for templates, names in sets.items()
    ]


def warnings(rows: Sequence[Row]) -> list[str]:
    """One line for each list of labels that models can't tell apart, with data sets and models."""
    of_pairs: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        if row.indistinguishable:
            of_pairs.setdefault(tuple(row.indistinguishable), []).append(row)
    lines = []
    for pairs, alike in of_pairs.items():
        sets = ", ".join(dict.fromkeys(row.dataset for row in alike))
        models = ", ".join(dict.fromkeys(display_name(row.source, row.alpha) for row in alike))
        shown = ", ".join(f"{first!r} and {second!r}" for first, second in pairs[:5])
        more = f" and {len(pairs) - 5} pairs more" if len(pairs) > 5 else ""
        lines.append(
            f"{sets}: warning: {models} can't tell apart {shown}{more} (cosine of the texts above"
            f" {SAME}): their scores are ties, and the first label wins"
        )
    return lines
