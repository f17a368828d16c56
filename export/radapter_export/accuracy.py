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
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.data.runs import OtherImages
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.confidence import fit_confidence
from radapter_serve.evaluation.image_sets import Answers, ClassificationSet, EvaluationSet
from radapter_serve.evaluation.metrics import check_finite
from radapter_serve.evaluation.models import Candidate, Change, from_release, in_torch
from radapter_serve.evaluation.run import evaluate_answers
from radapter_serve.evaluation.sets import open_set, own_validation
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.release.confidence import Confidence
from radapter_serve.release.release import Release

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

    def added_to(self, release: Release) -> Release:
        """The release with these figures among its facts."""
        return dataclasses.replace(
            release,
            accuracy=dataclasses.asdict(self.accuracy),
            confidence=None if self.confidence is None else dataclasses.asdict(self.confidence),
        )


@dataclass(frozen=True)
class Validation:
    """Data that releases are evaluated on, and the points that one may lose."""

    data: EvaluationSet
    max_drop: float

    def __call__(
        self,
        base: Base,
        alpha: float,
        loaded: LoadedRelease,
        templates: list[str],
        crop: MaskCrop,
        say: Callable[[str], None],
    ) -> Measured:
        """Evaluate a release and its base, whose adapters are attached and set to `alpha`; refuses
        a release that loses more than `max_drop`.
        """
        entry = self.data.entry
        [release] = from_release(loaded)
        # 80 templates of 1,000 labels take minutes, and label sets have them. With examples mixed
        # in, they are other embeddings than the texts'.
        by_example = loaded.release.sets_by_example
        for name, label_set in loaded.label_sets.items():
            if name not in by_example:
                embeds = check_finite(label_set.embeds)
                for line, embed in zip(label_set.lines, embeds, strict=True):
                    release.known[label_set.templates, line] = embed

        def score(name: str, model: Candidate) -> tuple[Answers, float]:
            say(f"{entry.data}: embedding its texts by {name}")
            [(row, answers)] = evaluate_answers(
                [model],
                self.data,
                keep=["scores"],
                progress=lambda done, n: say(f"{entry.data}: {done} of {n} images by {name}"),
            )
            return answers, round(100 * row.metrics[row.metric], 3)

        # The base stays on its device: adapters behind activations would not move with it.
        [attached] = in_torch(
            base,
            [Change("adapter", {})],
            [alpha],
            templates=templates,
            crop=crop,
            device=str(next(base.model.parameters()).device),
        )
        _, by_torch = score("torch", attached)
        answers, by_release = score("release", release)
        drop = round(by_torch - by_release, 3)
        if not drop <= self.max_drop:  # NaN, too
            raise RAdapterError(
                f"the encoders lose {drop:.2f} points of {entry.metric} on the {len(self.data)}"
                f" images of {entry.data} ({by_torch:.2f} by torch, {by_release:.2f} by the"
                f" release), and {self.max_drop:g} are allowed; nothing was written. Export with"
                " --precision fp32, or allow more with --max-drop"
            )
        n = len(self.data)
        accuracy = Accuracy(entry.data, n, entry.metric, by_torch, by_release, drop)

        # Calibrated scores, where the data has classes that `classify` would choose from.
        data = self.data
        if not isinstance(data, ClassificationSet):
            return Measured(accuracy)
        if data.several:
            line = (
                f"{entry.data} has several labels an image, by which scores are not calibrated: the"
                " release has no calibrated scores"
            )
            return Measured(accuracy, warnings=(line,))
        facts = loaded.release
        try:
            confidence = fit_confidence(
                answers["scores"], data.labels, facts.logit_scale, facts.logit_bias, entry.data
            )
        except RAdapterError as error:
            return Measured(accuracy, warnings=(str(error),))
        return Measured(accuracy, confidence)


def open_validation(
    metadata: Metadata, data: str | None, dense: str | None, precision: str, max_drop: float
) -> Validation | None:
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
        return Validation(open_set(suite, entry, limit=MOST), max_drop)
    except OtherImages:
        raise
    except RAdapterError:
        if data is None:
            return None
        raise
