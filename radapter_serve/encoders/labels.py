"""Label sets with their text embeddings, and the embeddings of labels that requests bring."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import Cancelled
from radapter_serve.contract.labels import check_labels, check_templates, means_of, prompts_of
from radapter_serve.encoders.label_store import LabelStore
from radapter_serve.encoders.needs import Steps
from radapter_serve.errors import RAdapterError
from radapter_serve.files import as_text, staged

if TYPE_CHECKING:
    from radapter_serve.encoders.loaded import LoadedRelease

DEFAULT_WEIGHT = 0.5  # of a label's examples beside its text
MAX_EXAMPLES = 128  # of a request, and of a label set that is embedded again
_PROMPTS = 256  # after which the labels so far are kept, and other callers have a turn
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


def load_label_sets(folder: Path) -> dict[str, LabelSet]:
    """All `NAME.npz` of a folder by name; none if there is no such folder."""
    return {as_text(path.stem): LabelSet.load(path) for path in sorted(folder.glob("*.npz"))}


class LabelCache:
    """Label sets that requests brought, and the embeddings of their labels and examples.

    Args:
        release: tells the releases apart that share a store.
        store: keeps the embeddings. Its `max_labels` also bounds how many labels and templates the
            lists that are kept have together.
    """

    def __init__(self, release: str, store: LabelStore) -> None:
        self.store = store
        self._release = release
        # Callers mostly send the same list again; this saves them the walk through it.
        self._sets: OrderedDict[Any, LabelSet] = OrderedDict()
        self._texts_in_sets = 0
        self._lock = threading.Lock()

    def key(self, *parts: Any) -> bytes:
        """The key of an embedding in the store."""
        return hashlib.sha256(repr((self._release, *parts)).encode()).digest()

    def get(self, key: Any) -> LabelSet | None:
        """The label set of a list of labels, if it was asked for before."""
        with self._lock:
            if key in self._sets:
                self._sets.move_to_end(key)
            return self._sets.get(key)

    def put(self, key: Any, label_set: LabelSet) -> None:
        """Keep a label set; the oldest go."""
        with self._lock:
            if key in self._sets:  # another thread was quicker
                return
            self._sets[key] = label_set
            self._texts_in_sets += _texts_of(label_set)
            while len(self._sets) > 1 and self._texts_in_sets > self.store.max_labels:
                _, dropped = self._sets.popitem(last=False)
                self._texts_in_sets -= _texts_of(dropped)


def _texts_of(label_set: LabelSet) -> int:
    return len(label_set.labels) + len(label_set.templates)


def embed_labels(
    loaded: LoadedRelease,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    alpha: float | None = None,
    cancelled: Cancelled | None = None,
    progress: Callable[[int], None] | None = None,
) -> Steps[LabelSet]:
    """Embed labels: the mean over all prompts (names x templates) at unit length, made unit
    length again; each is computed once per α and templates, and kept.

    Args:
        loaded: the release.
        labels: each perhaps with synonyms after commas.
        templates: with `{}` for the label.
        alpha: of the encoder; None where it is folded.
        cancelled: whether the caller has given up.
        progress: called now and then with the number of labels that are embedded.

    Raises:
        TaskError: no labels, an empty, a repeated or too long a one, a template without `{}`;
            cancelled.
    """
    cache = loaded.label_cache
    whole = (tuple(labels), tuple(templates), alpha)
    label_set = cache.get(whole)
    if label_set is not None:
        return label_set
    names = check_labels(labels)
    check_templates(templates)
    digest = hashlib.sha256(repr(tuple(templates)).encode()).digest()
    keys = {label: cache.key((alpha, digest), label) for label in labels}
    kept = cache.store.get(list(keys.values()))
    embeds = {label: kept[key] for label, key in keys.items() if key in kept}
    missing = deque(label for label in labels if label not in embeds)
    while missing:
        # Labels that have at most so many prompts together, or one with more.
        count = 0
        part: list[str] = []
        while missing and (not part or count < _PROMPTS):
            count += len(names[missing[0]]) * len(templates)
            part.append(missing.popleft())
        # Another process may have embedded the same labels since.
        kept = cache.store.get([keys[label] for label in part])
        embeds |= {label: kept[keys[label]] for label in part if keys[label] in kept}
        new = [label for label in part if label not in embeds]
        if new:
            prompts = [prompts_of(names[label], templates) for label in new]
            texts = list(dict.fromkeys(itertools.chain.from_iterable(prompts)))
            rows = loaded.tokenizer.encode(texts)
            encoded = yield from loaded.encoded("tokens", rows, alpha, cancelled)
            means = dict(zip(new, means_of(prompts, texts, encoded), strict=True))
            cache.store.put({keys[label]: mean for label, mean in means.items()})
            embeds |= means
        if progress is not None:
            progress(len(embeds))
    shown = tuple(names[label][0] for label in labels)
    rows_of_all = np.stack([embeds[label] for label in labels])
    label_set = LabelSet(shown, rows_of_all, tuple(labels), tuple(templates))
    cache.put(whole, label_set)
    return label_set


def check_unknown_labels(
    loaded: LoadedRelease, labels: Sequence[str], templates: Sequence[str], alpha: float | None
) -> None:
    """Refuse labels as embedding them would, at once.

    Raises:
        TaskError: as of `embed_labels`.
    """
    if loaded.label_cache.get((tuple(labels), tuple(templates), alpha)) is None:
        check_labels(labels)
        check_templates(templates)
