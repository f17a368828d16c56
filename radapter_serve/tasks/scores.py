"""From the cosines of an image with its labels to the labels that are given back, and their
scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.errors import NOT_CALIBRATED, TaskError, invalid
from radapter_serve.contract.names import known_as
from radapter_serve.contract.probabilities import class_probabilities
from radapter_serve.release.confidence import NO_TEMPERATURE, Confidence
from radapter_serve.release.release import Release

DEFAULT_TOP_K = 5
DEFAULT_THRESHOLD = 0.5
HOW = "export one with radapter-export --validation DATA"
UNKNOWN = "unknown"
BY_EXAMPLE = (
    "scores are not calibrated for examples that a request brings; leave multi_label, calibrated"
    " and unknown out, or export the labels with their examples as a label set, with --validation"
)
SEVERAL = "label sets whose scores were fitted apart; ask for calibrated scores of one at a time"


def fitted_min_score(release: Release, alpha: float) -> float:
    """The least score of a search by a text that a release was fitted to.

    Args:
        release: its facts.
        alpha: of the embeddings that are searched.

    Raises:
        TaskError: it has none, or not at this alpha.
    """
    facts = release.confidence
    fitted = None if facts is None else Confidence.from_dict(facts).min_score
    if fitted is None:
        raise TaskError(NOT_CALIBRATED, f"this release has no calibrated least score; {HOW}")
    if alpha != release.alpha:
        raise TaskError(
            NOT_CALIBRATED,
            f"the least score of this release is calibrated at alpha {release.alpha:g}, and the"
            f" index is at {alpha:g}",
        )
    return fitted


@dataclass(frozen=True)
class Doubt:
    """Which images show none of the labels.

    Args:
        least: score of the best label, by itself, below which an image is unknown, in [0, 1].
        scale, bias: sigmoid(scale x cosine + bias) is that score.
    """

    least: float
    scale: float
    bias: float

    def unknown(self, cosines: NDArray[np.float32]) -> np.float32 | None:
        """The score of an image's being unknown, one minus that of its best label; None where it
        is known.

        Args:
            cosines: float32 [C], finite.
        """
        best = class_probabilities(cosines.max(keepdims=True), self.scale, self.bias)[0]
        return None if best >= self.least else np.float32(1 - best)


@dataclass(frozen=True)
class Scores:
    """How one request wants its labels scored.

    Args:
        top_k: labels to give back; None for all.
        scale, bias: of the scores, as `class_probabilities` takes them.
        threshold: labels below it are left out; None leaves none out.
        doubt: which images are unknown; None for none.
    """

    top_k: int | None
    scale: float
    bias: float | None
    threshold: float | None = None
    doubt: Doubt | None = None

    @property
    def ragged(self) -> bool:
        """Whether images may get fewer labels than others."""
        return self.threshold is not None or self.doubt is not None

    def best(self, cosines: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The best labels of an image by their places, the best first, and their scores.

        Labels are ranked by their cosines: in float32, a sigmoid is the same for all logits above
        17. Of equal ones the first comes first.

        Args:
            cosines: float32 [C], finite.
        """
        k = len(cosines) if self.top_k is None else min(self.top_k, len(cosines))
        least = np.partition(cosines, -k)[-k]
        best = np.flatnonzero(cosines >= least)
        best = best[np.argsort(-cosines[best], kind="stable")][:k]
        scores = class_probabilities(cosines, self.scale, self.bias)[best]
        if self.threshold is not None:
            enough = scores >= self.threshold
            best = best[enough]
            scores = scores[enough]
        return best, scores


@dataclass(frozen=True)
class _Fitted:
    """What the scores of a request were fitted to.

    Args:
        confidence: None where there is none.
        why: it is None, as a sentence.
    """

    confidence: Confidence | None
    why: str = f"this release has no calibrated scores; {HOW}"


class Scoring:
    """The kinds of scores that a release has.

    Args:
        release: its facts.
    """

    def __init__(self, release: Release) -> None:
        self._scale = release.logit_scale
        self._bias = release.logit_bias
        self._alpha = np.float32(release.alpha)
        self._fitted = _Fitted(_confidence(release.confidence))
        self._by_example = {
            name: _Fitted(_confidence(facts.get("confidence")), _not_fitted(name))
            for name, facts in release.sets_by_example.items()
        }

    def __call__(
        self,
        top_k: Sequence[int] | None = None,
        multi_label: Sequence[bool] | None = None,
        threshold: Sequence[float] | None = None,
        calibrated: Sequence[bool] | None = None,
        alpha: Alpha | None = None,
        unknown: Sequence[float] | None = None,
        *,
        examples: bool = False,
        label_set: Sequence[bytes] | None = None,
    ) -> Scores:
        """The scores that a request asks for; the arguments have an entry for each of its images,
        all the same, but for `label_set`.

        `alpha` is as `RequestAlpha` gives it; `examples` says whether the request brings some.

        Raises:
            TaskError: a value that is not allowed; the release has no such scores, or none for
                labels by example.
        """
        k = one_value("top_k", top_k, lambda value: value >= 1, "one whole number from 1")
        alone, exact = (
            bool(one_value(name, of))
            for name, of in (("multi_label", multi_label), ("calibrated", calibrated))
        )
        least = one_value(
            "threshold", threshold, lambda value: 0 <= value <= 1, "one number from 0 to 1"
        )
        if least is not None and not alone:
            raise invalid("threshold leaves out labels that stand alone; send multi_label too")
        doubt = one_value(
            "unknown", unknown, lambda value: 0 <= value <= 1, "one number from 0 to 1"
        )
        if doubt is not None and alone:
            raise invalid("unknown does not go with multi_label, whose threshold says the same")
        fitted = self._fitted_to(examples, label_set)
        plain = self._scale, self._bias
        if not alone:
            scale, bias = self._calibrated(fitted, alpha) if exact else plain
            least = None if doubt is None else Doubt(float(doubt), *self._sigmoid(fitted, alpha))
            return Scores(DEFAULT_TOP_K if k is None else int(k), scale, bias, doubt=least)
        # Also of a model that was pretrained with a sigmoid: training moves the cosines, and leaves
        # the scale and the bias of its base where they were.
        scale, bias = self._sigmoid(fitted, alpha)
        return Scores(
            None if k is None else int(k),
            scale,
            bias,
            DEFAULT_THRESHOLD if least is None else least,
        )

    def _fitted_to(self, examples: bool, label_set: Sequence[bytes] | None) -> _Fitted:
        """What scores of some labels were fitted to: those by example, to their own label set."""
        if examples:
            return _Fitted(None, BY_EXAMPLE)
        if label_set is None or not self._by_example:
            return self._fitted
        found = {self._named(name.decode("utf-8", "replace")) for name in set(label_set)}
        return _Fitted(None, SEVERAL) if len(found) > 1 else next(iter(found), self._fitted)

    def _named(self, label_set: str) -> _Fitted:
        known = known_as(label_set, self._by_example)
        return self._fitted if known is None else self._by_example[known]

    def _calibrated(self, fitted: _Fitted, alpha: Alpha | None) -> tuple[float, float | None]:
        """Scale and bias of the scores that `calibrated` asks for."""
        if self._bias is not None:
            return self._sigmoid(fitted, alpha)
        temperature = self._of(fitted, alpha).temperature
        if temperature is None:
            why = f"in its validation data {NO_TEMPERATURE}"
            raise TaskError(NOT_CALIBRATED, f"this release has no temperature: {why}; {HOW}")
        return self._scale / temperature, None

    def _sigmoid(self, fitted: _Fitted, alpha: Alpha | None) -> tuple[float, float]:
        found = self._of(fitted, alpha)
        return found.scale, found.bias

    def _of(self, fitted: _Fitted, alpha: Alpha | None) -> Confidence:
        if fitted.confidence is None:
            raise TaskError(NOT_CALIBRATED, fitted.why)
        others = [] if alpha is None else list(alpha[alpha != self._alpha])
        if others:
            raise TaskError(
                NOT_CALIBRATED,
                f"the scores of this release are calibrated at alpha {self._alpha!s}, not at"
                f" {others[0]!s}",
            )
        return fitted.confidence


def _confidence(facts: Mapping[str, Any] | None) -> Confidence | None:
    return None if facts is None else Confidence.from_dict(facts)


def _not_fitted(label_set: str) -> str:
    return (
        f"the label set {label_set!r:.80} has labels by example, to which no scores were fitted;"
        " export it with --validation DATA whose classes are all among its labels"
    )


def one_value(
    name: str, values: Sequence[Any] | None, allowed: Any = lambda value: True, rule: str = "one"
) -> Any:
    """The value that all images of a request share; None where it brings none."""
    if values is None:
        return None
    given = [value.item() if isinstance(value, np.generic) else value for value in values]
    if len(set(given)) > 1 or not allowed(given[0]):
        shown = [round(value, 6) if isinstance(value, float) else value for value in given]
        raise invalid(f"{name} is {shown}; {rule} for all images of a request")
    return given[0]
