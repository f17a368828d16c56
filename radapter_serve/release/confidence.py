"""Calibrated scores of a release, fitted on validation data: the score is the share of right
answers.
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
    """Calibration on validation data, at the release's α.

    `sigmoid(scale·cosine + bias)` is the probability that a label is right, whatever the others
    are. The softmax over all labels is of logits divided by `temperature`, None for models with a
    sigmoid loss and for `NO_TEMPERATURE`. `ece_before` and `ece_after` are calibration errors of
    the best label's score, in [0, 1], as the model gives it and calibrated; `label_ece` that of all
    pairs of an image and a label. Each half of the images is scored by the fit on the other half.
    `min_score` is the cosine that at least `KEPT` of the images have with their own label,
    `false_answers` the share of labels that reach it with an image of another label. `dataset` has
    `n` images and `classes` labels.
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
        """Read the result of `dataclasses.asdict`; unknown names are ignored."""
        return cls(**{name: facts[name] for name in cls.__dataclass_fields__ if name in facts})


def fitted_at(release: Release, exported: float, alpha: float | None) -> Confidence:
    """The calibration of a release, fitted at the α of its export; refuses a release without one,
    and embeddings at another α (None where it is folded).
    """
    if release.confidence is None:
        raise TaskError(NOT_CALIBRATED, f"this release has no calibrated scores; {HOW}")
    if alpha is not None and np.float32(alpha) != np.float32(exported):
        raise TaskError(
            NOT_CALIBRATED,
            f"the scores of this release are calibrated at alpha {exported:g}, not at {alpha:g}",
        )
    return Confidence.from_dict(release.confidence)
