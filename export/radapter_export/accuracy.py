"""What a release costs in the task's own metric: torch with adapters attached and the encoders, on
the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from radapter_export.settings import NONE, OWN
from radapter_serve.adapter import Metadata
from radapter_serve.clip.base import Base
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.data.runs import OtherImages
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import ClassificationSet, EvaluationSet
from radapter_serve.evaluation.metrics import check_finite, fit_confidence
from radapter_serve.evaluation.models import Change, from_release, in_torch
from radapter_serve.evaluation.run import evaluate_answers, open_set, own_validation
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.release.release import Confidence

MOST = 2000  # images at most: one is 0.05 points then


@dataclass(frozen=True)
class Accuracy:
    """A metric of the task in per cent, by torch with adapters attached and by the encoders of a
    release.
    """

    dataset: str
    n: int  # images
    metric: str  # such as `acc1`
    torch: float
    release: float
    drop: float  # points lost; negative where the release is better


@dataclass(frozen=True)
class Measured:
    """The cost of a release on validation data, and calibrated scores where there are any."""

    accuracy: Accuracy
    confidence: Confidence | None = None  # of classification, by images enough
    warnings: tuple[str, ...] = ()  # why there is none


def measure(
    data: EvaluationSet,
    max_drop: float,
    base: Base,
    loaded: LoadedRelease,
    say: Callable[[str], None],
) -> Measured:
    """Evaluate a release and its base, whose adapters are attached and set to the release's α;
    refuses a release that loses more than `max_drop` points.
    """
    entry = data.entry
    facts = loaded.release
    [release] = from_release(loaded)
    # 80 templates of 1,000 labels take minutes, and label sets have them. With examples mixed in,
    # they are other embeddings than the texts'.
    for name, label_set in loaded.label_sets.items():
        if name not in facts.sets_by_example:
            embeds = check_finite(label_set.embeds)
            for line, embed in zip(label_set.lines, embeds, strict=True):
                release.known[label_set.templates, line] = embed
    # The base stays on its device: adapters behind activations would not move with it.
    [attached] = in_torch(
        base,
        [Change("adapter", {})],
        [facts.alpha],
        templates=facts.templates,
        crop=MaskCrop.from_dict(facts.crop),
        device=str(next(base.model.parameters()).device),
    )
    percents = []
    for name, model in (("torch", attached), ("release", release)):
        say(f"{entry.data}: embedding its texts by {name}")

        def done(count: int, total: int, name: str = name) -> None:
            say(f"{entry.data}: {count} of {total} images by {name}")

        [(row, answers)] = evaluate_answers([model], data, keep=["scores"], progress=done)
        percents.append(round(100 * row.metrics[row.metric], 3))
    by_torch, by_release = percents
    drop = round(by_torch - by_release, 3)
    if not drop <= max_drop:  # NaN, too
        raise RAdapterError(
            f"the encoders lose {drop:.2f} points of {entry.metric} on the {len(data)} images of"
            f" {entry.data} ({by_torch:.2f} by torch, {by_release:.2f} by the release), and"
            f" {max_drop:g} are allowed; nothing was written. Export with --precision fp32, or"
            " allow more with --max-drop"
        )
    accuracy = Accuracy(entry.data, len(data), entry.metric, by_torch, by_release, drop)

    # Calibrated scores, where the data has classes that `classify` would choose from.
    if not isinstance(data, ClassificationSet):
        return Measured(accuracy)
    if data.several:
        warning = (
            f"{entry.data} has several labels an image, by which scores are not calibrated: the"
            " release has no calibrated scores"
        )
        return Measured(accuracy, warnings=(warning,))
    try:
        confidence = fit_confidence(
            answers["scores"], data.labels, facts.logit_scale, facts.logit_bias, entry.data
        )
    except RAdapterError as error:
        return Measured(accuracy, warnings=(str(error),))
    return Measured(accuracy, confidence)


def open_validation(
    metadata: Metadata, data: str | None, dense: str | None, precision: str
) -> EvaluationSet | None:
    """Open the data that releases are to be evaluated on.

    `data` has the form of a recipe's `val_data`, or is "none", or "own" for the run's (its
    `val_data`, or the share that it held out). None takes the run's, where it can still be read and
    the precision is not fp32.
    """
    has_own = metadata.source.val_data or metadata.source.val_fraction
    if data == NONE or (data is None and (precision == "fp32" or not has_own)):
        return None
    suite = own_validation(metadata, None if data == OWN else data)
    [entry] = suite.entries
    if metadata.task == "segmentation":
        entry = dataclasses.replace(entry, dense=dense or PROPOSALS)
    try:
        return open_set(suite, entry, limit=MOST)
    except OtherImages:
        raise
    except RAdapterError:
        if data is None:
            return None
        raise
