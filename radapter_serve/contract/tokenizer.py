"""Tokenizers as in open_clip, without torch, from a `tokenizer.json` and a few settings."""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import ftfy
import numpy as np
import regex
import tokenizers
from numpy.typing import NDArray

from radapter_serve.contract.facts import Clean, TokenizerFacts
from radapter_serve.errors import RAdapterError, reason
from radapter_serve.files import check_model_file

# Words above _CACHED_LENGTH are not cached: they are rare and could fill the memory.
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 32
Rows = Callable[[Sequence[str]], list[list[int]]]  # cleaned texts to token ids


class Tokenizer:
    """Turns texts into token ids, int32 [N, L], where L is the context length or, with
    `dynamic_length`, for a causal tower, which never looks ahead, that of the longest text.
    """

    def __init__(self, core: tokenizers.Tokenizer, facts: TokenizerFacts) -> None:
        self.context_length = facts.context_length
        self.dynamic_length = facts.dynamic_length
        self._pad = facts.pad
        self._clean = _CLEAN[facts.clean]
        rows = {"clip": _clip_rows, "hf": _hugging_face_rows}
        self._rows = rows[facts.kind](core, facts)

    @classmethod
    def load(cls, path: str | Path, facts: TokenizerFacts) -> Tokenizer:
        """Read `tokenizer.json`, with a release's facts about it."""
        try:
            check_model_file(Path(path))
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise RAdapterError(
                f"could not read the tokenizer {path}: {reason(error):.200}; fetch the release"
                " again, or make it again with: radapter-export"
            ) from None
        return cls(core, facts)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Token ids, int32 [N, L], padded; a text that is too long is cut before its end token."""
        return self.batch(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without padding, at most `context_length` each."""
        return self._rows([self._clean(text) for text in texts])

    def batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        """Pad rows of `encode` to one length, int32 [N, L]."""
        length = max(map(len, rows), default=1) if self.dynamic_length else self.context_length
        tokens = np.full((len(rows), length), self._pad, dtype=np.int32)
        for out, row in zip(tokens, rows, strict=True):
            out[: len(row)] = row
        return tokens


def _clip_rows(core: tokenizers.Tokenizer, facts: TokenizerFacts) -> Rows:
    """open_clip's `SimpleTokenizer`: words with `regex`, then byte-level BPE of each."""
    added = sorted(core.get_added_tokens_decoder().items())
    special = {token.content: index for index, token in added}
    # The file's pre-tokenizer is not used: in its regex engine, \p{L} follows another version of
    # Unicode.
    pattern = "|".join(special) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    words = regex.compile(pattern, regex.IGNORECASE).findall
    start = facts.start
    end = facts.end
    context_length = facts.context_length
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def word_ids(word: str) -> tuple[int, ...]:
        if word in special:
            return (special[word],)
        [(shown, _)] = byte_level.pre_tokenize_str(word)
        return tuple(token.id for token in core.model.tokenize(shown))

    cached_ids = lru_cache(_CACHED_WORDS)(word_ids)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        rows = []
        for text in texts:
            row = [start]
            for word in words(text):
                row.extend(cached_ids(word) if len(word) <= _CACHED_LENGTH else word_ids(word))
                if len(row) >= context_length:
                    break
            rows.append([*row[: context_length - 1], end])
        return rows

    return encode


def _hugging_face_rows(core: tokenizers.Tokenizer, facts: TokenizerFacts) -> Rows:
    """open_clip's `HFTokenizer`: special tokens and truncation as in the file."""
    core.no_padding()
    core.enable_truncation(facts.context_length)
    strip = facts.strip

    def encode(texts: Sequence[str]) -> list[list[int]]:
        rows = [encoding.ids for encoding in core.encode_batch(list(texts))]
        if strip is None:
            return rows
        return [[0 if token == strip else token for token in row] for row in rows]

    return encode


def _basic(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _canonicalize(text: str) -> str:
    text = _basic(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


_CLEAN: dict[Clean, Callable[[str], str]] = {
    "lower": lambda text: " ".join(_basic(text).split()).lower(),
    "whitespace": lambda text: " ".join(_basic(text).split()),
    "canonicalize": _canonicalize,
}
