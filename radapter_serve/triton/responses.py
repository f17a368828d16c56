"""From Triton's requests to inputs, and from outcomes to its responses; importable only inside one
of its processes.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    CANCELLED,
    ENCODER_FAILED,
    INTERNAL_ERROR,
    OVERLOADED,
    RESTARTING,
    SERVER_STOPPING,
    TIMED_OUT,
    Cancelled,
    TaskError,
    invalid,
)
from radapter_serve.tasks.outcome import Outcome, isolated
from radapter_serve.triton import surplus

MAX_SECONDS = 120.0  # of work on one request
# seconds after which requests that are worked on together hang: the encoders answer within a minute
HUNG = 300.0

_TOO_MANY: Outcome[Any] = Outcome(
    error=TaskError(
        OVERLOADED,
        "too many requests wait for this model, or this one waited too long; ask again later",
    )
)

T = TypeVar("T")
A = TypeVar("A")


def read(request: Any, name: str) -> Any:
    """A request's input as an array, or None where it was left out."""
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def need(request: Any, name: str) -> Any:
    """A request's input as an array.

    Raises:
        TaskError: it was left out.
    """
    array = read(request, name)
    if array is None:
        raise invalid(f"the input {name} is missing")
    return array


def given_up(request: Any) -> Cancelled:
    """What tells a task that nobody waits for a request any more.

    Over gRPC Triton knows when a caller has left. Over HTTP it does not, so no request may take
    longer than
    `MAX_SECONDS`: asked after that, this raises a `TaskError`.
    """
    deadline = time.monotonic() + MAX_SECONDS

    def ask() -> bool:
        if time.monotonic() > deadline:
            raise TaskError(
                TIMED_OUT, f"this request takes more than {MAX_SECONDS:g} s; ask for less at once"
            )
        return bool(request.is_cancelled())

    return ask


def answer(
    requests: Sequence[Any],
    read_one: Callable[[Any], T],
    run: Callable[[Sequence[T]], Sequence[Outcome[A]]],
    outputs: Callable[[A], dict[str, NDArray[Any]]],
) -> list[Any]:
    """One response for each request. Whatever is wrong with a request, its neighbours are answered
    as without it.

    What takes `HUNG` seconds ends this process, with a traceback in the server's log;
    `radapter-serve` starts it again. From outside nobody could tell that it hangs, where another
    instance of the task answers in its place.
    Where too many requests wait for this model, the first of these are refused: they have waited
    longest.

    Args:
        requests: what Triton gave to `execute`.
        read_one: what the task needs of a request; may raise a `TaskError`.
        run: the outcomes of all requests that could be read.
        outputs: the output tensors of an answer, by name.
    """
    refused = surplus.of_this_process.take(len(requests))
    if refused:
        return [_response(_TOO_MANY) for _ in range(refused)] + answer(
            requests[refused:], read_one, run, outputs
        )
    faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__ or 2)
    try:
        inputs = [Outcome.of(partial(read_one, request)) for request in requests]
        outcomes = iter(isolated(run, [one.unwrap() for one in inputs if one.error is None]))
        return [_response(one.then(lambda _: outputs(next(outcomes).unwrap()))) for one in inputs]
    finally:
        faulthandler.cancel_dump_traceback_later()


def each(task: Callable[[T], A]) -> Callable[[Sequence[T]], list[Outcome[A]]]:
    """A task for one request as `answer` runs it."""
    return lambda requests: [Outcome.of(partial(task, request)) for request in requests]


def _response(outcome: Outcome[dict[str, NDArray[Any]]]) -> Any:
    if (error := outcome.error) is None:
        return pb.InferenceResponse(
            [pb.Tensor(name, array) for name, array in outcome.unwrap().items()]
        )
    kinds = {
        ENCODER_FAILED: pb.TritonError.INTERNAL,
        INTERNAL_ERROR: pb.TritonError.INTERNAL,
        CANCELLED: pb.TritonError.CANCELLED,
        **dict.fromkeys((SERVER_STOPPING, RESTARTING, OVERLOADED), pb.TritonError.UNAVAILABLE),
    }
    code = kinds.get(error.code, pb.TritonError.INVALID_ARG)
    return pb.InferenceResponse(error=pb.TritonError(str(error), code))
