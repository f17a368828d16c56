"""What a release costs in the task's own metric: torch with adapters attached and the encoders, on
the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_export.settings import NONE, OWN
from radapter_serve.adapter import Metadata
from radapter_serve.clip.base import Base
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.data.held_out import OtherImages
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.confidence import fit_confidence
from radapter_serve.evaluation.embedder import PROPOSALS, Embedder
from radapter_serve.evaluation.evaluate import Scored, evaluate_scored
from radapter_serve.evaluation.evaluation_set import EvaluationSet, Known, first_names
from radapter_serve.evaluation.image_sets import ClassificationSet, SeveralLabelsSet
from radapter_serve.evaluation.metrics import Floats, check_finite
from radapter_serve.evaluation.release_embedder import ReleaseEmbedder
from radapter_serve.evaluation.row import Row
from radapter_serve.evaluation.run import own_validation
from radapter_serve.evaluation.sets import open_set
from radapter_serve.evaluation.torch_embedder import from_attached
from radapter_serve.release.confidence import Confidence
from radapter_serve.release.release import Release
from radapter_serve.tasks.classify import load_label_sets
from radapter_serve.tasks.label_embeddings import LabelSet

MOST = 2000  # images at most: one is 0.05 points then


@dataclass(frozen=True)
class Accuracy:
    """A metric of the task in per cent, by torch with adapters attached and by the encoders of a
    release.

    Attributes:
        dataset: what they were evaluated on.
        n: its images.
        metric: such as `acc1`.
        torch, release: its two values.
        drop: points lost; negative where the release is better.
    """

    dataset: str
    n: int
    metric: str
    torch: float
    release: float
    drop: float


@dataclass(frozen=True)
class LabelSetFigures:
    """What validation data said of a label set with labels by example.

    Attributes:
        accuracy: share of the images whose best label is right, in [0, 1].
        confidence: what makes scores of its labels calibrated; None of too few images.
    """

    accuracy: float
    confidence: Confidence | None


@dataclass(frozen=True)
class Measured:
    """What validation data said of a release.

    Attributes:
        accuracy: what the release costs.
        confidence: what makes its scores calibrated; None of other tasks than classification, and
            of too few images.
        warnings: why it is None, where one might expect it; a line each.
        label_sets: of those with labels by example, where the data has their labels; by name.
    """

    accuracy: Accuracy
    confidence: Confidence | None = None
    warnings: tuple[str, ...] = ()
    label_sets: Mapping[str, LabelSetFigures] = field(default_factory=dict)

    def added_to(self, release: Release) -> Release:
        """A release that says what was measured of it."""
        label_sets = {name: dict(facts) for name, facts in release.label_sets.items()}
        for name, found in self.label_sets.items():
            label_sets[name]["accuracy"] = found.accuracy
            if found.confidence is not None:
                label_sets[name]["confidence"] = dataclasses.asdict(found.confidence)
        return dataclasses.replace(
            release,
            accuracy=dataclasses.asdict(self.accuracy),
            confidence=None if self.confidence is None else dataclasses.asdict(self.confidence),
            label_sets=label_sets,
        )


@dataclass(frozen=True)
class Validation:
    """Data that releases are evaluated on before they are put in place.

    Attributes:
        data: opened.
        max_drop: points that a release may lose.
    """

    data: EvaluationSet
    max_drop: float

    def __call__(
        self,
        base: Base,
        alpha: float,
        repository: Path,
        templates: list[str],
        crop: MaskCrop,
        say: Callable[[str], None],
    ) -> Measured:
        """Evaluate one release.

        Args:
            base: with adapters attached and set to `alpha`.
            alpha: of the release.
            repository: holds the release alone.
            templates: prompt templates of the release.
            crop: how the release shows the masks of proposals.
            say: called with a line about what is going on.

        Raises:
            RAdapterError: the release loses more than `max_drop`; an image can't be read.
        """
        entry = self.data.entry
        release = _Keeping(str(repository))
        sets = _label_sets(repository)
        by_text = [one for name, one in sets.items() if name not in release.by_example]
        known = {release.variants[0].key: _label_embeds(by_text)}
        by_torch = self._score(
            "torch", from_attached(base, alpha, templates, crop=crop), known, say
        )
        by_release = self._score("release", release, known, say)
        torch = _per_cent(by_torch.row)
        own = _per_cent(by_release.row)
        drop = round(torch - own, 3)
        if not drop <= self.max_drop:  # NaN, too
            raise RAdapterError(
                f"the encoders lose {drop:.2f} points of {entry.metric} on the {len(self.data)}"
                f" images of {entry.data} ({torch:.2f} by torch, {own:.2f} by the release), and"
                f" {self.max_drop:g} are allowed; nothing was written. Export with --precision"
                f" fp32, or allow more with --max-drop"
            )
        accuracy = Accuracy(entry.data, len(self.data), entry.metric, torch, own, drop)
        measured = self._measured(accuracy, release.facts, by_release.cosines)
        shown = {name: sets[name] for name in release.by_example}
        return self._with_release(measured, release, shown)

    def _score(
        self, name: str, embedder: Embedder, known: dict[Any, Known], say: Callable[[str], None]
    ) -> Scored:
        """Evaluate the one model of an embedder."""
        data = self.data.entry.data
        say(f"{data}: embedding its texts by {name}")
        (scored,) = evaluate_scored(
            embedder,
            self.data,
            known=known,
            progress=lambda done, n: say(f"{data}: {done} of {n} images by {name}"),
        )
        return scored

    def _measured(self, accuracy: Accuracy, facts: Release, cosines: Floats | None) -> Measured:
        """The accuracy, and calibrated scores where the data has classes that `classify` would
        choose from.
        """
        if not isinstance(self.data, ClassificationSet) or self.data.members or cosines is None:
            return Measured(accuracy)
        if isinstance(self.data, SeveralLabelsSet):
            line = (
                f"{accuracy.dataset} has several labels an image, by which scores are not"
                " calibrated: the release has no calibrated scores"
            )
            return Measured(accuracy, warnings=(line,))
        try:
            confidence = fit_confidence(
                cosines,
                self.data.labels,
                facts.logit_scale,
                facts.logit_bias,
                accuracy.dataset,
            )
        except RAdapterError as error:
            return Measured(accuracy, warnings=(str(error),))
        return Measured(accuracy, confidence)

    def _with_release(
        self, measured: Measured, release: _Keeping, label_sets: Mapping[str, LabelSet]
    ) -> Measured:
        """What the data says of this release alone: of label sets with labels by example, where it
        has their labels.
        """
        warnings = list(measured.warnings)
        found: dict[str, LabelSetFigures] = {}
        for name, label_set in label_sets.items():
            truth = self._truth(label_set)
            if truth is None:
                warnings.append(
                    f"no scores are fitted to the label set {name}: it has labels by example, which"
                    f" takes data with one of its labels an image, and {measured.accuracy.dataset}"
                    " is other"
                )
                continue
            cosines = check_finite(np.concatenate(release.kept) @ label_set.embeds.T)
            accuracy = float((cosines.argmax(axis=1) == truth).mean())
            confidence = None
            try:
                confidence = fit_confidence(
                    cosines,
                    truth,
                    release.facts.logit_scale,
                    release.facts.logit_bias,
                    measured.accuracy.dataset,
                )
            except RAdapterError as error:
                warnings.append(f"label set {name}: {error}")
            found[name] = LabelSetFigures(round(accuracy, 5), confidence)
        return dataclasses.replace(
            measured,
            warnings=tuple(warnings),
            label_sets=found,
        )

    def _truth(self, label_set: LabelSet) -> NDArray[np.int64] | None:
        """Of each image its label's place in a label set; None where there are other classes."""
        data = self.data
        if not isinstance(data, ClassificationSet) or isinstance(data, SeveralLabelsSet):
            return None
        if data.members:
            return None
        places = {label: place for place, label in enumerate(label_set.labels)}
        own = [places.get(name) for name in first_names(data.classes)]
        if None in own:
            return None
        found: NDArray[np.int64] = np.array(own, np.int64)[data.labels]
        return found


class _Keeping(ReleaseEmbedder):
    """A release that keeps the embeddings of images, where label sets by example need them.

    Attributes:
        by_example: names of these label sets.
        kept: of the images so far, float32 [N, D] each.
    """

    def __init__(self, repository: str) -> None:
        super().__init__(repository)
        self.by_example = list(self.facts.sets_by_example)
        self.kept: list[Floats] = []

    def embed_images(self, items: Sequence[Any]) -> Floats:
        embeds = super().embed_images(items)
        if self.by_example:
            self.kept.append(embeds)
        return embeds


def _per_cent(row: Row) -> float:
    return round(100 * row.metrics[row.metric], 3)


def _label_sets(repository: Path) -> dict[str, LabelSet]:
    """The label sets of the newest release in a repository, which is the one that is evaluated."""
    newest = max(repository.glob("classify/[0-9]*"), key=lambda folder: int(folder.name))
    return load_label_sets(newest / "label_sets")


def _label_embeds(label_sets: Sequence[LabelSet]) -> Known:
    """What label sets hold: 80 templates of 1,000 labels take minutes."""
    return {
        (of.templates, line): embed
        for of in label_sets
        for line, embed in zip(of.lines, check_finite(of.embeds), strict=True)
    }


def open_validation(
    metadata: Metadata,
    data: str | None,
    way: str | None,
    precision: str,
    max_drop: float,
) -> Validation | None:
    """Open the data that releases are to be evaluated on.

    Args:
        metadata: of the adapter, whose recipe says which columns and classes the data has.
        data: of the form of a recipe's `val_data`; "none" for none; "own" for the run's own
            (`val_data`, or the share that it held out). If None, the run's own, where it can still
            be read and the precision is not fp32.
        way: how the release embeds patches; None if it does not.
        precision: of the release.
        max_drop: points that a release may lose.

    Raises:
        RAdapterError: the data that was asked for can't be read; the images that training held out
            are others now.
    """
    own = data is None
    exact = precision == "fp32"
    has_own = metadata.source.val_data or metadata.source.val_fraction
    if data == NONE or (own and (exact or not has_own)):
        return None
    suite = own_validation(metadata, None if data == OWN else data)
    (entry,) = suite.entries
    if metadata.task == "segmentation":
        entry = dataclasses.replace(entry, dense=way or PROPOSALS)
    try:
        return Validation(open_set(suite, entry, limit=MOST), max_drop)
    except OtherImages:
        raise
    except RAdapterError:
        if own:
            return None
        raise
