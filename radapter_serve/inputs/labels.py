"""Classes by name: label files, prompt templates, label sets with their text embeddings, and a cache of the latter."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.files import staged
from radapter_serve.inputs.alpha import Alpha, Encode, at
from radapter_serve.inputs.errors import CANCELLED, INVALID_ARGUMENT, NO_LABELS, TaskError
from radapter_serve.inputs.tokenizer import Tokenizer

BUILT_IN_TEMPLATES = {"simple": ["a photo of a {}."]}
# Of one request, checked before a prompt is built. A label set that is exported may have more prompts.
MAX_PROMPTS = 20_000
MAX_CHARACTERS = 10_000_000  # of all its prompts together
MAX_TEXT_LENGTH = 10_000
MAX_LABEL_LENGTH = 1_000  # of a label with its synonyms, and of a template
MAX_PLACES = 4  # for the label in a template
_BATCHES = 16  # of prompts, after which the labels so far are kept, even if the caller gives up

_Prompts = tuple[float | None, bytes]  # α, and the digest of the templates


def read_label_file(path: str | Path) -> list[str]:
    """Read a label file: UTF-8, one class a line, synonyms after commas; blank lines and `#` comments are skipped.

    Returns:
        The classes in the file's order, synonyms and all ("cat, kitty").

    Raises:
        RAdapterError: no such file, not text, no class in it, or a class named twice (with the line's number).
    """
    seen: dict[str, int] = {}
    labels = []
    for number, line in _lines(path):
        names = split_label(line)
        if not names:
            raise RAdapterError(f"{path}, line {number}: {line!r} names no class")
        if names[0] in seen:
            raise RAdapterError(f"{path}, line {number}: the class {names[0]!r} is already on line {seen[names[0]]}")
        seen[names[0]] = number
        labels.append(", ".join(names))
    if not labels:
        raise RAdapterError(f"{path} names no class; write one class a line")
    return labels


def read_templates(source: str | Path | Sequence[str]) -> list[str]:
    """Prompt templates from a list, the name of a built-in set ("simple"), one template, or a file with one a line.

    Raises:
        RAdapterError: a template without `{}`, where the label goes, or too long a one, or no such file.
    """
    if isinstance(source, (str, Path)):
        text = str(source)
        if text in BUILT_IN_TEMPLATES:
            return list(BUILT_IN_TEMPLATES[text])
        if "{}" in text:
            return [text]
        names = ", ".join(BUILT_IN_TEMPLATES)
        templates = [line for _, line in _lines(source, f"or one of the built-in sets: {names}")]
    else:
        templates = list(source)
    if not templates:
        raise RAdapterError(f"{source}: no template; write one a line, such as 'a photo of a {{}}.'")
    try:
        check_templates(templates)
    except TaskError as error:
        raise RAdapterError(error.message) from None
    return templates


def split_label(label: str) -> list[str]:
    """The names in "cat, kitty": the one to show, then its synonyms."""
    return list(dict.fromkeys(name for name in map(str.strip, label.split(",")) if name))


_TEXTS = ("labels", "lines", "templates")  # of a label set


@dataclass(frozen=True)
class LabelSet:
    """Classes and their text embeddings.

    Args:
        labels: names to show, C of them.
        embeds: float32 [C, D], unit length.
        lines: the labels with their synonyms, and
        templates: their prompt templates: what it takes to embed them again; none in files of earlier releases.
    """

    labels: tuple[str, ...]
    embeds: NDArray[np.float32]
    lines: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write all of it as npz, in one piece or not at all."""
        texts = {name: np.array(getattr(self, name), dtype=np.str_) for name in _TEXTS}
        with staged(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, embeds=np.asarray(self.embeds, np.float32), **texts)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> LabelSet:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            texts = {name: tuple(file[name].tolist()) for name in _TEXTS if name in file.files}
            return cls(embeds=np.ascontiguousarray(file["embeds"], np.float32), **texts)


class LabelEmbedder:
    """Text embeddings of labels: computed once per (α, templates, label), kept in a bounded cache.

    One embedder belongs to one release, so the release is no part of the key.

    Args:
        tokenizer: the release's tokenizer.
        encode_tokens: int32 [B, L], with α where that is an input, -> float32 [B, D] of unit length.
        max_batch_size: rows that `encode_tokens` takes at most.
        cache_size: number of labels whose embeddings are kept; the least recently used go first.
    """

    def __init__(
        self, tokenizer: Tokenizer, encode_tokens: Encode, *, max_batch_size: int = 64, cache_size: int = 20_000
    ) -> None:
        self._tokenizer, self._encode, self._max_batch_size = tokenizer, encode_tokens, max_batch_size
        # Templates by their digest, and labels have a greatest length: so the size bounds the bytes, too.
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
        cancelled: Callable[[], bool] | None = None,
    ) -> LabelSet:
        """Embed labels: the mean over all prompts (names x templates) at unit length, made unit length again.

        Args:
            labels: each perhaps with synonyms after commas.
            templates: with `{}` for the label.
            alpha: where that is an input of the encoder; else None.
            cancelled: asked between batches; where it says yes, nobody waits for the rest.

        Raises:
            TaskError: no labels, an empty, a repeated or too long a one, a template without `{}`; cancelled.
        """
        key = (alpha, hashlib.sha256(repr(tuple(templates)).encode()).digest()), tuple(labels)
        if (found := self._sets.get(key)) is not None:
            self._sets.move_to_end(key)
            return found
        label_set = self._sets[key] = self._embed(key[0], tuple(templates), key[1], cancelled)
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
        cancelled: Callable[[], bool] | None,
    ) -> LabelSet:
        names = check_labels(labels)
        check_templates(templates)
        known: dict[str, NDArray[np.float32]] = {}
        for label in labels:
            if (embed := self._cache.get((prompts, label))) is not None:
                known[label] = embed
                self._cache.move_to_end((prompts, label))
        encode = at(self._encode, prompts[0])
        missing = {label: names[label] for label in labels if label not in known}
        for part in _parts(missing, _BATCHES * self._max_batch_size // len(templates)):
            for label, embed in self._compute(encode, templates, part, cancelled).items():
                known[label] = self._cache[prompts, label] = embed
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
            if len(known) < len(labels) and cancelled is not None and cancelled():
                raise TaskError(CANCELLED, "the caller gave up")
        embeds = np.stack([known[label] for label in labels])
        return LabelSet(tuple(names[label][0] for label in labels), embeds, labels, templates)

    def _compute(
        self,
        encode: Encode,
        templates: tuple[str, ...],
        missing: dict[str, list[str]],
        cancelled: Callable[[], bool] | None,
    ) -> dict[str, NDArray[np.float32]]:
        prompts = {
            label: [template.replace("{}", name) for name in names for template in templates]
            for label, names in missing.items()
        }
        texts = list(dict.fromkeys(prompt for some in prompts.values() for prompt in some))
        where = {text: row for row, text in enumerate(texts)}
        embeds = embed_texts(texts, self._tokenizer, encode, self._max_batch_size, cancelled)
        return {label: _unit(embeds[[where[text] for text in some]].mean(0)) for label, some in prompts.items()}


def embed_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    encode_tokens: Encode,
    max_batch_size: int,
    cancelled: Callable[[], bool] | None = None,
    alpha: Alpha | None = None,
) -> NDArray[np.float32]:
    """Embed texts in batches of similar length, float32 [N, D] in the order of `texts`; `alpha` has the α of each.

    Raises:
        TaskError: `cancelled`, asked before each batch but the first, said yes.
    """
    if not texts:
        return np.zeros((0, 0), np.float32)
    rows = tokenizer.encode(texts)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = [order[start : start + max_batch_size] for start in range(0, len(order), max_batch_size)]
    embeds: list[NDArray[np.float32]] = []
    for batch in batches:
        if embeds and cancelled is not None and cancelled():
            raise TaskError(CANCELLED, "the caller gave up")
        tokens = tokenizer.batch([rows[index] for index in batch])
        embeds.append(encode_tokens(tokens) if alpha is None else encode_tokens(tokens, alpha[batch]))
    result = np.empty((len(rows), embeds[0].shape[1]), np.float32)
    result[order] = np.concatenate(embeds)
    return result


def check_labels(labels: Sequence[str]) -> dict[str, list[str]]:
    """Each label's names.

    Raises:
        TaskError: no labels, an empty, a repeated or too long a one.
    """
    if not labels:
        raise TaskError(NO_LABELS, "no labels; give at least one")
    names: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for number, label in enumerate(labels, 1):
        check_length(label, MAX_LABEL_LENGTH, "label")
        names[label] = split_label(label)
        if not names[label]:
            raise TaskError(INVALID_ARGUMENT, f"label {number} of {len(labels)} is empty ({label!r})")
        if (shown := names[label][0]) in first:
            raise TaskError(INVALID_ARGUMENT, f"label {number}, {shown!r}, is the same as label {first[shown]}")
        first[shown] = number
    return names


def check_templates(templates: Sequence[str]) -> None:
    """Raise a `TaskError` for no template, or one without a place for the label, with too many, or too long."""
    if not templates:
        raise TaskError(
            INVALID_ARGUMENT, "no templates; give at least one, such as 'a photo of a {}.', or leave them out"
        )
    for template in templates:
        check_length(template, MAX_LABEL_LENGTH, "template")
        if not 1 <= template.count("{}") <= MAX_PLACES:
            many = f"more than {MAX_PLACES}" if "{}" in template else "no"
            raise TaskError(
                INVALID_ARGUMENT,
                f"the template {template[:80]!r} has {many} {{}} where the label goes; such as 'a photo of a {{}}.'",
            )


def check_length(text: str, limit: int = MAX_TEXT_LENGTH, what: str = "text") -> None:
    """Raise a `TaskError` for a text too long to be meant."""
    if len(text) > limit:
        raise TaskError(
            INVALID_ARGUMENT, f"a {what} of {len(text)} characters ({text[:30]!r}...); at most {limit} are allowed"
        )


def check_prompts(lists: Iterable[tuple[Sequence[str], Sequence[str]]]) -> None:
    """Raise a `TaskError` where the labels and templates of one request would make too many or too long prompts.

    Args:
        lists: labels and templates that the request brings; several pairs where its images have lists of their own.
    """
    prompts = characters = 0
    for labels, templates in lists:
        check_templates(templates)
        for label in labels:
            check_length(label, MAX_LABEL_LENGTH, "label")
        names, length = sum(label.count(",") + 1 for label in labels), sum(map(len, labels))
        prompts += names * len(templates)
        characters += sum(names * len(template) + length * template.count("{}") for template in templates)
    for number, limit, what in ((prompts, MAX_PROMPTS, "prompts"), (characters, MAX_CHARACTERS, "characters")):
        if number > limit:
            raise TaskError(
                INVALID_ARGUMENT,
                f"{number} {what} in all prompts (names x templates) of one request; at most {limit} are allowed, "
                "so export them as a label set: radapter-export --label-set NAME=FILE",
            )


def _parts(names: dict[str, list[str]], most: int) -> Iterable[dict[str, list[str]]]:
    """Labels with so many names together, or one that has more."""
    part: dict[str, list[str]] = {}
    count = 0
    for label, own in names.items():
        if part and count + len(own) > most:
            yield part
            part, count = {}, 0
        part[label] = own
        count += len(own)
    if part:
        yield part


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def _lines(path: str | Path, alternative: str = "") -> Iterable[tuple[int, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RAdapterError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        hint = f"; give a file {alternative}" if alternative else ""
        raise RAdapterError(f"cannot read {path}: {error.strerror}{hint}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, line
