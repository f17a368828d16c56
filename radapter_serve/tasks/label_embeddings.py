"""Label sets with their text embeddings, and what embeds the labels that requests bring."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.alpha import Encode, at
from radapter_serve.contract.errors import Cancelled, check_cancelled
from radapter_serve.contract.labels import check_labels, check_templates, mean_embeddings
from radapter_serve.contract.tokenizer import Tokenizer, embed_texts
from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.tasks.label_store import LabelStore

DEFAULT_WEIGHT = 0.5  # of a label's examples beside its text
MAX_EXAMPLES = 128  # of a request, and of a label set that is embedded again
_BATCHES = 16  # of prompts, after which the labels so far are kept, even if the caller gives up

_Prompts = tuple[float | None, bytes]  # α, and the digest of the templates
_TEXTS = ("labels", "lines", "templates")  # of a label set


@dataclass(frozen=True)
class Examples:
    """Images that show some labels of a list.

    Args:
        images: encoded images.
        labels: of each example, the place of its label in the list, from 0.
        weights: of the examples of a label beside its text, in [0, 1]: one for all labels, or one
            for each of the list; 1 leaves the text out.
    """

    images: tuple[bytes, ...]
    labels: tuple[int, ...]
    weights: tuple[float, ...] = (DEFAULT_WEIGHT,)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each image; those of a label set are asked for again and again."""
        return tuple(hashlib.sha256(image).digest() for image in self.images)


@dataclass(frozen=True)
class LabelSet:
    """Classes and their embeddings.

    Args:
        labels: names to show, C of them.
        embeds: float32 [C, D], unit length, those of examples mixed in.
        lines: the labels with their synonyms, and
        templates: their prompt templates: what it takes to embed them again.
        examples: those mixed in, where it takes them to embed the labels again; else None.
    """

    labels: tuple[str, ...]
    embeds: NDArray[np.float32]
    lines: tuple[str, ...]
    templates: tuple[str, ...]
    examples: Examples | None = None

    def save(self, path: str | Path) -> None:
        """Write all of it as npz, in one piece or not at all."""
        arrays: dict[str, Any] = {
            name: np.array(getattr(self, name), dtype=np.str_) for name in _TEXTS
        }
        if self.examples is not None:
            arrays |= {
                "examples": np.frombuffer(b"".join(self.examples.images), np.uint8),
                "example_sizes": np.array([len(image) for image in self.examples.images]),
                "example_labels": np.array(self.examples.labels),
                "example_weights": np.array(self.examples.weights),
            }
        with staged(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, embeds=np.asarray(self.embeds, np.float32), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Read what `save` wrote.

        Raises:
            RAdapterError: more examples than an export writes.
        """
        with np.load(path, allow_pickle=False) as file:
            texts = {name: tuple(file[name].tolist()) for name in _TEXTS}
            embeds = np.ascontiguousarray(file["embeds"], np.float32)
            return cls(embeds=embeds, **texts, examples=_examples(file, path))


def _examples(file: Mapping[str, NDArray[Any]], path: str | Path) -> Examples | None:
    if "examples" not in file:
        return None
    sizes = file["example_sizes"]
    if sizes.size > MAX_EXAMPLES:
        raise RAdapterError(
            f"{path} has {sizes.size} examples; at most {MAX_EXAMPLES} are allowed; export it again"
            " with radapter-export"
        )
    whole = file["examples"].tobytes()
    ends = np.cumsum(sizes).tolist()
    return Examples(
        tuple(whole[start:end] for start, end in itertools.pairwise([0, *ends])),
        tuple(file["example_labels"].tolist()),
        tuple(file["example_weights"].tolist()),
    )


class LabelEmbedder:
    """Text embeddings of labels: computed once per (α, templates, label), and kept.

    Args:
        tokenizer: the release's tokenizer.
        encode_tokens: int32 [B, L], with α where that is an input, -> float32 [B, D] of unit
            length.
        max_batch_size: rows that `encode_tokens` takes at most.
        store: keeps the embeddings, perhaps for several releases. Its `max_labels` also bounds how
            many labels the lists that are kept have together.
        release: tells its releases apart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encode_tokens: Encode,
        *,
        max_batch_size: int = 64,
        store: LabelStore | None = None,
        release: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = encode_tokens
        self._max_batch_size = max_batch_size
        self.store = LabelStore() if store is None else store
        self.release = release
        # Callers mostly send the same list again; this saves them the walk through it.
        self._sets: OrderedDict[tuple[_Prompts, tuple[str, ...]], LabelSet] = OrderedDict()
        self._labels_in_sets = 0
        self._lock = threading.Lock()

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
        key = _key_of(labels, templates, alpha)
        with self._lock:
            found = self._sets.get(key)
            if found is not None:
                self._sets.move_to_end(key)
                return found
        label_set = self._embed(key[0], tuple(templates), key[1], cancelled, progress)
        with self._lock:
            self._remember(key, label_set)
        return label_set

    def check(
        self, labels: Sequence[str], templates: Sequence[str], *, alpha: float | None = None
    ) -> None:
        """Refuse labels as embedding them would, at once.

        Args:
            labels, templates, alpha: as for the call.

        Raises:
            TaskError: as of the call, but for cancelled.
        """
        with self._lock:
            if _key_of(labels, templates, alpha) in self._sets:
                return
        check_labels(labels)
        check_templates(templates)

    def _remember(self, key: tuple[_Prompts, tuple[str, ...]], label_set: LabelSet) -> None:
        if key in self._sets:  # by another thread, meanwhile
            return
        self._sets[key] = label_set
        self._labels_in_sets += len(label_set.labels)
        while len(self._sets) > 1 and self._labels_in_sets > self.store.max_labels:
            _, dropped = self._sets.popitem(last=False)
            self._labels_in_sets -= len(dropped.labels)

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
        encode = at(self._encode, prompts[0])

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return embed_texts(texts, self._tokenizer, encode, self._max_batch_size, cancelled)

        keys = {label: self._key(prompts, label) for label in labels}
        known = self._kept(keys)
        missing = {label: names[label] for label in labels if label not in known}
        for part in _parts(missing, _BATCHES * self._max_batch_size // len(templates)):
            # Another process may have embedded the same labels since.
            known.update(self._kept({label: keys[label] for label in part}))
            new = [label for label in part if label not in known]
            if new:
                own = dict(zip(new, mean_embeddings(embed, new, templates), strict=True))
                self.store.put({keys[label]: mean for label, mean in own.items()})
                known.update(own)
            if progress is not None:
                progress(len(known))
            if len(known) < len(labels):
                check_cancelled(cancelled)
        embeds = np.stack([known[label] for label in labels])
        return LabelSet(tuple(names[label][0] for label in labels), embeds, labels, templates)

    def _key(self, prompts: _Prompts, label: str) -> bytes:
        return hashlib.sha256(repr((self.release, prompts, label)).encode()).digest()

    def _kept(self, keys: Mapping[str, bytes]) -> dict[str, NDArray[np.float32]]:
        found = self.store.get(list(keys.values()))
        return {label: found[key] for label, key in keys.items() if key in found}


def _key_of(
    labels: Sequence[str], templates: Sequence[str], alpha: float | None
) -> tuple[_Prompts, tuple[str, ...]]:
    prompts = alpha, hashlib.sha256(repr(tuple(templates)).encode()).digest()
    return prompts, tuple(labels)


def _parts(names: dict[str, list[str]], most: int) -> Iterator[list[str]]:
    """Labels that have at most so many names together; a label with more names stands alone."""
    part: list[str] = []
    count = 0
    for label, own in names.items():
        if part and count + len(own) > most:
            yield part
            part = []
            count = 0
        part.append(label)
        count += len(own)
    if part:
        yield part
