"""Which labels a request means: a list that it brings, or a label set of the release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from radapter_serve.contract.errors import (
    NO_LABELS,
    UNKNOWN_LABEL_SET,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.contract.labels import check_prompts
from radapter_serve.contract.names import known_as
from radapter_serve.encoders.labels import LabelSet, check_unknown_labels, embed_labels
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import Steps


@dataclass(frozen=True)
class Labels:
    """The labels of a request: a list, or the name of a label set.

    Attributes:
        names: each perhaps with synonyms after commas, or None.
        label_set: its name, or None.
        templates: prompt templates of `names`, or None for the release's.

    Raises:
        TaskError: both, or neither.
    """

    names: Sequence[str] | None = None
    label_set: str | None = None
    templates: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.label_set is not None and (self.names is not None or self.templates is not None):
            raise invalid("give labels (with templates, if you like) or label_set, not both")


def check_labels(
    loaded: LoadedRelease, labels: Labels, alpha: float | None, *, by_example: bool = False
) -> int:
    """How many labels a request means.

    Args:
        loaded: the release.
        labels: of the request.
        alpha: of the encoder; None where it is folded.
        by_example: whether the task takes label sets with examples.

    Raises:
        TaskError: no labels, or bad ones; bad templates; no such label set.
    """
    if labels.label_set is not None:
        name = _known_label_set(loaded, labels.label_set)
        if name in loaded.release.sets_by_example and not by_example:
            raise invalid(
                f"the label set {name!r:.80} has labels by example, which are for classify; give"
                " labels, or another label set"
            )
        return len(loaded.label_sets[name].labels)
    if labels.names is None:
        sets = _names_of_label_sets(loaded)
        raise TaskError(NO_LABELS, f"give labels, or a label_set of this release: {sets}")
    templates = loaded.release.templates if labels.templates is None else labels.templates
    check_prompts([(labels.names, templates)])
    check_unknown_labels(loaded, labels.names, templates, alpha)
    return len(labels.names)


def embed_label_set(
    loaded: LoadedRelease, labels: Labels, alpha: float | None, cancelled: Cancelled | None
) -> Steps[LabelSet]:
    """The label set of a request that `check_labels` let through, with examples that are still to
    be mixed in.
    """
    if labels.label_set is None:
        names = labels.names or ()
        templates = loaded.release.templates if labels.templates is None else labels.templates
        return (yield from embed_labels(loaded, names, templates, alpha=alpha, cancelled=cancelled))
    exported = loaded.label_sets[_known_label_set(loaded, labels.label_set)]
    if alpha is None or np.float32(alpha) == np.float32(loaded.release.alpha):
        return replace(exported, examples=None)  # the export mixed them in
    embedded = yield from embed_labels(
        loaded, exported.lines, exported.templates, alpha=alpha, cancelled=cancelled
    )
    return replace(embedded, examples=exported.examples)


def _known_label_set(loaded: LoadedRelease, name: str) -> str:
    known = known_as(name, loaded.label_sets)
    if known is None:
        sets = _names_of_label_sets(loaded)
        raise TaskError(
            UNKNOWN_LABEL_SET, f"no label set {name!r:.80} in this release; there are: {sets}"
        )
    return known


def _names_of_label_sets(loaded: LoadedRelease) -> str:
    names = ", ".join(sorted(loaded.label_sets))
    return names or "none (radapter-export --label-set NAME=FILE makes one)"
