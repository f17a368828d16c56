"""Which labels a request means: a list that it brings, or a label set of the release."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from radapter_serve.contract.alpha import Alpha, each
from radapter_serve.contract.errors import (
    NO_LABELS,
    UNKNOWN_LABEL_SET,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.contract.labels import check_prompts
from radapter_serve.contract.names import known_as
from radapter_serve.release.release import Release
from radapter_serve.tasks.examples import check_encoded
from radapter_serve.tasks.label_embeddings import Examples, LabelEmbedder, LabelSet

Texts = Sequence[bytes]
_List = tuple[tuple[str, ...], tuple[str, ...], float | None]  # labels, templates and α
Mix = Callable[[LabelSet, Examples, Alpha | None, Cancelled | None], LabelSet]


@dataclass(frozen=True)
class Wanted:
    """The labels of a request, which are not embedded yet.

    Attributes:
        counts: of the labels of each image.
        embed: the label set of each image; it asks between batches of prompts and of examples
            whether the caller has given up, and may raise a `TaskError`.
    """

    counts: list[int]
    embed: Callable[[Cancelled | None], list[LabelSet]]


class LabelSource:
    """The label sets of requests.

    Args:
        release: its prompt templates are for requests that bring none.
        embed_labels: embeds the labels that a request brings.
        label_sets: the release's label sets by name, at its own α.
        mix: mixes examples into a label set at another α; None where labels by example are refused.
    """

    def __init__(
        self,
        release: Release,
        embed_labels: LabelEmbedder,
        label_sets: Mapping[str, LabelSet],
        mix: Mix | None = None,
    ) -> None:
        self._mix = mix
        self._by_example = set(release.sets_by_example)
        self._templates = tuple(release.templates)
        self._alpha = np.float32(release.alpha)
        self._embed_labels = embed_labels
        self._label_sets = label_sets

    def read(
        self,
        labels: Sequence[Texts] | None,
        label_set: Texts | None,
        templates: Sequence[Texts] | None,
        alpha: Alpha | None = None,
    ) -> Wanted:
        """The labels of a request; the arguments have one entry per image.

        Args:
            labels: labels of each image, or None.
            label_set: name of a label set for each image, or None.
            templates: prompt templates for `labels`, or None for the release's.
            alpha: of each image, from `RequestAlpha`.

        Raises:
            TaskError: neither labels nor a label set, or both; an unknown label set; bad labels or
                templates; too many examples at too many α.
        """
        if label_set is not None:
            if labels is not None or templates is not None:
                raise invalid("give labels (with templates, if you like) or label_set, not both")
            known = {name: self._known_as(name) for name in set(label_set)}
            rows = [
                (known[name], own)
                for name, own in zip(label_set, each(alpha, len(label_set)), strict=False)
            ]
            shown = ((self._label_sets[name].examples, at) for name, at in dict.fromkeys(rows))
            check_encoded(
                (own, at) for own, at in shown if own is not None and not self._is_own(at)
            )
            counts = [len(self._label_sets[name].labels) for name, _ in rows]
            return Wanted(counts, partial(self._named, rows))
        if labels is None:
            raise TaskError(
                NO_LABELS, f"give labels, or a label_set of this release: {self._known()}"
            )
        own: Sequence[Sequence[Any]] = (
            [self._templates] * len(labels) if templates is None else templates
        )
        lists: list[_List] = []
        last: Any = None
        row: Any
        for row in zip(labels, own, each(alpha, len(labels)), strict=False):
            # Mostly all images of a request bring the same list.
            if last is None or not all(map(np.array_equal, row, last)):
                found = (strings(*row[0]), strings(*row[1]), row[2])
                last = row
            lists.append(found)
        unique = {id(one): one for one in lists}
        check_prompts((texts, prompts) for texts, prompts, _ in unique.values())
        for texts, prompts, at in unique.values():
            self._embed_labels.check(texts, prompts, alpha=at)
        return Wanted([len(texts) for texts, _, _ in lists], partial(self._listed, lists))

    def _listed(self, lists: Sequence[_List], cancelled: Cancelled | None) -> list[LabelSet]:
        """The label set of each list, each made once."""
        unique = {id(one): one for one in lists}
        embedded = {
            key: self._embed_labels(texts, prompts, alpha=at, cancelled=cancelled)
            for key, (texts, prompts, at) in unique.items()
        }
        return [embedded[id(one)] for one in lists]

    def _known_as(self, name: bytes) -> str:
        text = name.decode("utf-8", "replace")
        known = known_as(text, self._label_sets)
        if known in self._by_example and self._mix is None:
            raise invalid(
                f"the label set {known!r:.80} has labels by example, which are for classify; give"
                " labels, or another label set"
            )
        if known is None:
            raise TaskError(
                UNKNOWN_LABEL_SET,
                f"no label set {text!r:.80} in this release; there are: {self._known()}",
            )
        return known

    def _named(
        self, rows: Sequence[tuple[str, float | None]], cancelled: Cancelled | None
    ) -> list[LabelSet]:
        """The label set of each row by its name and α, each made once."""
        unique = list(dict.fromkeys(rows))
        made = {(name, alpha): self._at(name, alpha, cancelled) for name, alpha in unique}
        return [made[row] for row in rows]

    def _is_own(self, alpha: float | None) -> bool:
        return alpha is None or alpha == self._alpha

    def _at(self, name: str, alpha: float | None, cancelled: Cancelled | None) -> LabelSet:
        found = self._label_sets[name]
        if alpha is None or self._is_own(alpha):
            return found
        texts = self._embed_labels(found.lines, found.templates, alpha=alpha, cancelled=cancelled)
        if found.examples is None or self._mix is None:
            return texts
        return self._mix(texts, found.examples, np.full((1, 1), alpha, np.float32), cancelled)

    def _known(self) -> str:
        return (
            ", ".join(sorted(self._label_sets))
            or "none (radapter-export --label-set NAME=FILE makes one)"
        )


def strings(*values: bytes | str) -> tuple[str, ...]:
    """Texts as a request brings them, decoded.

    Raises:
        TaskError: one is not UTF-8.
    """
    try:
        return tuple(value if isinstance(value, str) else value.decode() for value in values)
    except UnicodeDecodeError as error:
        raise invalid(f"a text is not UTF-8 ({error})") from None
