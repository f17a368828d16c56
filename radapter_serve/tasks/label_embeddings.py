"""Label sets with their text embeddings, and a cache of the embeddings of the labels that requests
bring.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Encode, at
from radapter_serve.contract.errors import Cancelled, check_cancelled
from radapter_serve.contract.labels import check_labels, check_templates, mean_embeddings
from radapter_serve.contract.tokenizer import Tokenizer, embed_texts
from radapter_serve.files import staged

_BATCHES = 16  # of prompts, after which the labels so far are kept, even if the caller gives up

_Prompts = tuple[float | None, bytes]  # α, and the digest of the templates
_TEXTS = ("labels", "lines", "templates")  # of a label set


@dataclass(frozen=True)
class LabelSet:
    """Classes and their text embeddings.

    Args:
        labels: names to show, C of them.
        embeds: float32 [C, D], unit length.
        lines: the labels with their synonyms, and
        templates: their prompt templates: what it takes to embed them again.
    """

    labels: tuple[str, ...]
    embeds: NDArray[np.float32]
    lines: tuple[str, ...]
    templates: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write all of it as npz, in one piece or not at all."""
        texts = {name: np.array(getattr(self, name), dtype=np.str_) for name in _TEXTS}
        with staged(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, embeds=np.asarray(self.embeds, np.float32), **texts)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            texts = {name: tuple(file[name].tolist()) for name in _TEXTS}
            return cls(embeds=np.ascontiguousarray(file["embeds"], np.float32), **texts)


class LabelEmbedder:
    """Text embeddings of labels: computed once per (α, templates, label), kept in a bounded cache.

    One embedder belongs to one release, so the release is no part of the key.

    Args:
        tokenizer: the release's tokenizer.
        encode_tokens: int32 [B, L], with α where that is an input, -> float32 [B, D] of unit
            length.
        max_batch_size: rows that `encode_tokens` takes at most.
        cache_size: number of labels whose embeddings are kept; the least recently used go first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encode_tokens: Encode,
        *,
        max_batch_size: int = 64,
        cache_size: int = 20_000,
    ) -> None:
        self._tokenizer, self._encode, self._max_batch_size = (
            tokenizer,
            encode_tokens,
            max_batch_size,
        )
        # Templates by their digest, and labels have a greatest length: so the size bounds the
        # bytes, too.
        self._cache: OrderedDict[tuple[_Prompts, str], NDArray[np.float32]] = OrderedDict()
        self._cache_size = cache_size
        # Callers mostly send the same list again; this saves them the walk through it.
        self._sets: OrderedDict[tuple[_Prompts, tuple[str, ...]], LabelSet] = OrderedDict()
        self._labels_in_sets = 0

    def __call__(
        self,
        labels: Sequence[str],
        templates: Sequence[str],
        *,
        alpha: float | None = None,
        cancelled: Cancelled | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> LabelSet:
        """Embed labels: the mean over all prompts (names x templates) at unit length, made unit
        length again.

        Args:
            labels: each perhaps with synonyms after commas.
            templates: with `{}` for the label.
            alpha: where that is an input of the encoder; else None.
            cancelled: asked between batches; where it says yes, nobody waits for the rest.
            progress: called now and then with the number of labels that are embedded.

        Raises:
            TaskError: no labels, an empty, a repeated or too long a one, a template without `{}`;
                cancelled.
        """
        key = (alpha, hashlib.sha256(repr(tuple(templates)).encode()).digest()), tuple(labels)
        if (found := self._sets.get(key)) is not None:
            self._sets.move_to_end(key)
            return found
        label_set = self._sets[key] = self._embed(
            key[0], tuple(templates), key[1], cancelled, progress
        )
        self._labels_in_sets += len(labels)
        while len(self._sets) > 1 and self._labels_in_sets > self._cache_size:
            _, dropped = self._sets.popitem(last=False)
            self._labels_in_sets -= len(dropped.labels)
        return label_set

    def _embed(
        self,
        prompts: _Prompts,
        templates: tuple[str, ...],
        labels: tuple[str, ...],
        cancelled: Cancelled | None,
        progress: Callable[[int], None] | None,
    ) -> LabelSet:
        names = check_labels(labels)
        check_templates(templates)
        known: dict[str, NDArray[np.float32]] = {}
        for label in labels:
            if (mean := self._cache.get((prompts, label))) is not None:
                known[label] = mean
                self._cache.move_to_end((prompts, label))
        encode = at(self._encode, prompts[0])

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return embed_texts(texts, self._tokenizer, encode, self._max_batch_size, cancelled)

        missing = {label: names[label] for label in labels if label not in known}
        for part in _parts(missing, _BATCHES * self._max_batch_size // len(templates)):
            means = mean_embeddings(embed, part, templates)
            for label, mean in zip(part, means, strict=True):
                known[label] = self._cache[prompts, label] = mean
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
            if progress is not None:
                progress(len(known))
            if len(known) < len(labels):
                check_cancelled(cancelled)
        embeds = np.stack([known[label] for label in labels])
        return LabelSet(tuple(names[label][0] for label in labels), embeds, labels, templates)


def _parts(names: dict[str, list[str]], most: int) -> Iterator[list[str]]:
    """Labels that have at most so many names together; a label with more names stands alone."""
    part: list[str] = []
    count = 0
    for label, own in names.items():
        if part and count + len(own) > most:
            yield part
            part, count = [], 0
        part.append(label)
        count += len(own)
    if part:
        yield part
