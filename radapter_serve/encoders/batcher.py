"""`run_together`, which runs several tasks and encodes the rows that they need as one batch.

A task is a generator: it yields a `Need`, is sent the embeddings, and returns its answer. So its
code reads from top to bottom and does not depend on other requests, while its rows are encoded
together with theirs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    OVERLOADED,
    RESTARTING,
    SERVER_STOPPING,
    TaskError,
    task_error,
)
from radapter_serve.encoders.loaded import Need, TaskSteps

A = TypeVar("A")
Result: TypeAlias = "NDArray[Any] | TaskError"

MOST_ROWS = 256  # rows of several tasks in one batch


def encode_together(needs: Sequence[Need]) -> list[Result]:
    """Encode needs of one part of one release in few batches, so that none affects the others."""
    loaded = needs[0].loaded
    results: list[Result] = []
    if needs[0].part == "pixels":
        # Start to decode the images of all needs, before waiting for the first.
        waits: list[Callable[[], NDArray[Any]] | None] = []
        for need in needs:
            try:
                waits.append(loaded.decoder.start(need.rows, need.cancelled, loaded.large_images))
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
        embeds = loaded.encode(needs)
    except Exception as error:
        later = (OVERLOADED, RESTARTING, SERVER_STOPPING)
        if len(needs) == 1 or (isinstance(error, TaskError) and error.code in later):
            return [task_error(error)] * len(needs)
    else:
        ends = itertools.accumulate(len(need.rows) for need in needs)
        return [embeds[end - len(need.rows) : end] for need, end in zip(needs, ends, strict=True)]
    # Halve a batch that fails until the failing need is found. Outside of `except`, so that the
    # log does not repeat this error for each half.
    half = len(needs) // 2
    return encode_together(needs[:half]) + encode_together(needs[half:])


def complete(task: TaskSteps[A]) -> A:
    """Run one task, and return its answer or raise its `TaskError`."""
    [answer] = run_together([task])
    if isinstance(answer, TaskError):
        raise answer
    return answer


def run_together(
    tasks: Sequence[TaskSteps[A]],
    together: Callable[[Sequence[Need]], Sequence[Result]] = encode_together,
) -> list[A | TaskError]:
    """Run tasks side by side, with needs encoded by `together`; each has an answer or error."""
    answers: list[Any] = [None] * len(tasks)
    needs: dict[int, Need] = {}

    def advance(number: int, resume: Callable[[], Need]) -> None:
        """Run a task until its next need, or its end."""
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
            # Take the first waiting need and others of the same kind, up to `MOST_ROWS` rows: the
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
