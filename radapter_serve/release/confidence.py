"""How sure a release may be: what makes its scores the share of answers that are right, fitted on
validation data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from radapter_serve.contract.errors import NOT_CALIBRATED, TaskError
from radapter_serve.release.release import Release

HOW = "export one with radapter-export --validation DATA"

#: why a softmax has no temperature that is best
NO_TEMPERATURE = "every image was right, or scores are no higher for right answers"

#: share of the images that a search with the calibrated least score is to keep
KEPT = 0.95


@dataclass(frozen=True)
class Confidence:
    """What was fitted on validation data, at the release's own α.

    Args:
        scale, bias: sigmoid(scale x cosine + bias) is the probability that a label is right,
            whatever the others are.
        dataset: the validation data.
        n: its images.
        classes: its labels.
        temperature: the softmax over all labels is of logits divided by it; None for models that
            were trained with a sigmoid loss, and for `NO_TEMPERATURE`.
        ece_before: calibration error of the best label's score as the model gives it, in [0, 1].
        ece_after: the same of the calibrated score. Each half of the images is scored by what the
            other half says.
        label_ece: calibration error of all pairs of an image and a label by `scale` and `bias`, by
            halves too.
        min_score: cosine that at least `KEPT` of the images have with their own label; of a release
            that an earlier export made, None.
        false_answers: share of the labels that reach it with an image of another label, in [0, 1].
    """

    scale: float
    bias: float
    dataset: str
    n: int
    classes: int
    ece_before: float
    label_ece: float
    temperature: float | None = None
    ece_after: float | None = None
    min_score: float | None = None
    false_answers: float | None = None

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Confidence:
        """Read what `dataclasses.asdict` gave; unknown names are ignored."""
        return cls(**{name: facts[name] for name in cls.__dataclass_fields__ if name in facts})


def fitted_at(release: Release, alpha: float) -> Confidence:
    """What a release was fitted to.

    Args:
        release: its facts.
        alpha: of the embeddings that are scored.

    Raises:
        TaskError: nothing was fitted, or not at this alpha.
    """
    if release.confidence is None:
        raise TaskError(NOT_CALIBRATED, f"this release has no calibrated scores; {HOW}")
    if np.float32(alpha) != np.float32(release.alpha):
        raise TaskError(
            NOT_CALIBRATED,
            f"the scores of this release are calibrated at alpha {release.alpha:g}, not at"
            f" {alpha:g}",
        )
    return Confidence.from_dict(release.confidence)
