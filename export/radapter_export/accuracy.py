"""What a release costs in the task's own metric: torch with adapters attached and the encoders, on
the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_export.settings import NONE, OWN
from radapter_serve.adapter import Metadata
from radapter_serve.clip.base import Base
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.data.held_out import OtherImages
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.confidence import fit_confidence
from radapter_serve.evaluation.embedder import PROPOSALS, Embedder
from radapter_serve.evaluation.evaluate import Scored, evaluate_scored
from radapter_serve.evaluation.evaluation_set import EvaluationSet, Known
from radapter_serve.evaluation.image_sets import ClassificationSet, SeveralLabelsSet
from radapter_serve.evaluation.metrics import Floats, check_finite
from radapter_serve.evaluation.release_embedder import ReleaseEmbedder
from radapter_serve.evaluation.row import Row
from radapter_serve.evaluation.run import own_validation
from radapter_serve.evaluation.sets import open_set
from radapter_serve.evaluation.torch_embedder import from_attached
from radapter_serve.release.confidence import Confidence
from radapter_serve.release.release import Release

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
class Measured:
    """What validation data said of a release.

    Attributes:
        accuracy: what the release costs.
        confidence: what makes its scores calibrated; None of other tasks than classification, and
            of too few images.
        warnings: why it is None, where one might expect it; a line each.
    """

    accuracy: Accuracy
    confidence: Confidence | None = None
    warnings: tuple[str, ...] = ()

    def added_to(self, release: Release) -> Release:
        """A release that says what was measured of it."""
        return dataclasses.replace(
            release,
            accuracy=dataclasses.asdict(self.accuracy),
            confidence=None if self.confidence is None else dataclasses.asdict(self.confidence),
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
        loaded = load_release(repository)
        release = ReleaseEmbedder(loaded)
        by_example = loaded.release.sets_by_example
        by_text = [one for name, one in loaded.label_sets.items() if name not in by_example]
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
        loaded.close()
        return self._measured(accuracy, loaded.release, by_release.cosines)

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


def _per_cent(row: Row) -> float:
    return round(100 * row.metrics[row.metric], 3)


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
