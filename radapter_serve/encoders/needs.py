"""Rows that tasks need encoded, and how those of several tasks are encoded together.

A task is a generator: it yields a `Need`, is sent the embeddings, and returns its answer. So it
reads from top to bottom, knows nothing of other requests, and whoever serves it encodes its rows
with those of everyone who waits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    OVERLOADED,
    RESTARTING,
    Cancelled,
    TaskError,
    check_cancelled,
    task_error,
)
from radapter_serve.contract.errors import SERVER_STOPPING as STOPPING
from radapter_serve.encoders.decoder import Decoder
from radapter_serve.encoders.encoder import Encoder
from radapter_serve.release.release import Release

A = TypeVar("A")
Part: TypeAlias = Literal["pixels", "images", "patches", "tokens"]
Rows = NDArray[np.generic]

# Images that the encoder takes at once. On a CPU more are slower: what lies between the layers no
# longer fits in its cache.
CHUNK = 16
MOST_ROWS = 256  # of several tasks that are encoded at once


class Tokenize(Protocol):
    """Turns texts into token ids; `Tokenizer` does."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""

    def batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        """Rows of `encode` padded to one length, int32 [N, L]."""


class Encodes(Protocol):
    """The part of a `LoadedRelease` that encodes rows."""

    release: Release
    encoder: Encoder
    tokenizer: Tokenize

    @property
    def decoder(self) -> Decoder:
        """Decodes images to what the encoder takes."""


@dataclass(frozen=True, eq=False)
class Need:
    """Rows that a task needs from one part of a release: "pixels" decodes images to uint8
    [N, S, S, 3]; "images" and "patches" encode such pixels, "tokens" encodes texts.
    """

    loaded: Encodes
    part: Part
    rows: Any  # the headers of images; pixels; or the token ids of each text
    alpha: float | None  # None where it is folded
    cancelled: Cancelled | None  # whether the caller has given up


Steps: TypeAlias = Generator[Need, Any, A]
Result: TypeAlias = "Rows | TaskError"
# The results of needs of one part of one release.
EncodeTogether: TypeAlias = Callable[[Sequence[Need]], Sequence[Result]]


def encode_together(needs: Sequence[Need]) -> list[Result]:
    """Encode needs of one part of one release as few batches.

    Needs that fail together are halved until the one is found that does it, so that no request
    touches its neighbours; but not where the encoder can't answer anybody now.
    """
    loaded = needs[0].loaded
    results: list[Result] = []
    if needs[0].part == "pixels":
        # Begin to decode the images of all needs before the first is waited for.
        waits: list[Callable[[], Rows] | None] = []
        for need in needs:
            try:
                waits.append(loaded.decoder.start(need.rows, need.cancelled))
            except MemoryError:
                waits.append(None)
        for wait in waits:
            if wait is None:
                why = "the server has not enough memory for the images; send fewer"
                results.append(TaskError(IMAGE_TOO_LARGE, why))
                continue
            try:
                results.append(wait())
            except Exception as error:
                results.append(task_error(error))
        return results
    try:
        embeds = encode(loaded, needs)
    except Exception as error:
        again = isinstance(error, TaskError) and error.code in (OVERLOADED, RESTARTING, STOPPING)
        if again or len(needs) == 1:
            return [task_error(error)] * len(needs)
    else:
        ends = itertools.accumulate(len(need.rows) for need in needs)
        return [embeds[end - len(need.rows) : end] for need, end in zip(needs, ends, strict=True)]
    # Here the error is let go of: the log has it once, not again for each half.
    half = len(needs) // 2
    return encode_together(needs[:half]) + encode_together(needs[half:])


def encode(loaded: Encodes, needs: Sequence[Need]) -> NDArray[np.float32]:
    """Embeddings of the rows of all needs, which are of one encoder, in their order."""
    size = loaded.release.max_batch_size
    alphas: NDArray[np.float32] | None = None
    parts = []
    if needs[0].part == "tokens":
        # Each text once at each α, with others of about its length.
        asked = [(tuple(row), need.alpha) for need in needs for row in need.rows]
        unique = sorted(dict.fromkeys(asked), key=lambda text: len(text[0]))
        for start in range(0, len(unique), size):
            if start and len(needs) == 1:
                check_cancelled(needs[0].cancelled)
            batch = unique[start : start + size]
            tokens = loaded.tokenizer.batch([row for row, _ in batch])
            if batch[0][1] is not None:
                alphas = np.array([[alpha] for _, alpha in batch], np.float32)
            parts.append(loaded.encoder.tokens(tokens, alphas))
        places = {text: place for place, text in enumerate(unique)}
        return np.concatenate(parts)[[places[text] for text in asked]]

    # Images in as few calls as there can be, of about as many rows.
    encoder = loaded.encoder.images if needs[0].part == "images" else loaded.encoder.patches
    rows = [np.asarray(need.rows) for need in needs]
    pixels = rows[0] if len(rows) == 1 else np.concatenate(rows)
    if not len(pixels):
        return np.zeros((0, loaded.release.embed_dim), np.float32)
    if needs[0].alpha is not None:
        each = [np.full((len(need.rows), 1), need.alpha, np.float32) for need in needs]
        alphas = np.concatenate(each)
    count = math.ceil(len(pixels) / min(CHUNK, size))
    edges = [len(pixels) * number // count for number in range(count + 1)]
    for start, end in itertools.pairwise(edges):
        parts.append(encoder(pixels[start:end], None if alphas is None else alphas[start:end]))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def complete(steps: Steps[A], together: EncodeTogether = encode_together) -> A:
    """Run one task; raises the `TaskError` that it ends with."""
    [answer] = run_together([steps], together)
    if isinstance(answer, TaskError):
        raise answer
    return answer


def run_together(
    tasks: Sequence[Steps[A]], together: EncodeTogether = encode_together
) -> list[A | TaskError]:
    """Run tasks side by side, whose needs are encoded `together`; an error is its own task's
    alone.
    """
    answers: list[Any] = [None] * len(tasks)
    needs: dict[int, Need] = {}

    def advance(number: int, resume: Callable[[], Need]) -> None:
        """Let a task go on until it needs something, or ends."""
        try:
            needs[number] = resume()
        except StopIteration as done:
            answers[number] = done.value
        except Exception as error:
            answers[number] = task_error(error)

    with contextlib.ExitStack() as stack:
        for number, task in enumerate(tasks):
            stack.callback(task.close)
            advance(number, partial(next, task))
        while needs:
            # Those of the first task that waits, and others of the same kind, up to some rows: the
            # rest have their turn after other callers.
            first = next(iter(needs.values()))
            numbers: list[int] = []
            rows = 0
            for number, need in needs.items():
                if need.loaded is not first.loaded or need.part != first.part:
                    continue
                rows += len(need.rows)
                if numbers and rows > MOST_ROWS:
                    break
                numbers.append(number)
            asked = [needs.pop(number) for number in numbers]
            try:
                results = together(asked)
            except Exception as error:
                results = [task_error(error)] * len(asked)
            for number, result in zip(numbers, results, strict=True):
                task = tasks[number]
                if isinstance(result, TaskError):
                    advance(number, partial(task.throw, result))
                else:
                    advance(number, partial(task.send, result))
    return answers
