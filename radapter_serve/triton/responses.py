"""From results to Triton's responses; importable only inside one of its processes."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_serve.contract.errors import (
    OVERLOADED,
    TIMED_OUT,
    Cancelled,
    TaskError,
)
from radapter_serve.environment import otlp_endpoint
from radapter_serve.triton import surplus

MAX_SECONDS = 120.0  # of work on one request
# seconds after which requests that are worked on together hang: the encoders answer within a minute
HUNG = 300.0

_trace: ContextVar[Any] = ContextVar("trace", default=None)
_TOO_MANY = TaskError(
    OVERLOADED,
    "too many requests wait for this model, or this one waited too long; ask again later",
)


def given_up(request: Any) -> Cancelled:
    """What tells a task that nobody waits for a request any more.

    Over gRPC Triton knows when a caller has left. Over HTTP it does not, so no request may take
    longer than its own parameter `timeout` (microseconds), or than `MAX_SECONDS`: asked after that,
    this raises a `TaskError`.
    """
    seconds = min(request.timeout() / 1e6 or MAX_SECONDS, MAX_SECONDS)
    deadline = time.monotonic() + seconds

    def ask() -> bool:
        if time.monotonic() > deadline:
            raise TaskError(
                TIMED_OUT, f"this request takes more than {seconds:g} s; ask for less at once"
            )
        return bool(request.is_cancelled())

    return ask


def answer(
    requests: Sequence[Any],
    run: Callable[[Sequence[Any]], Sequence[Mapping[str, NDArray[Any]] | TaskError]],
) -> list[Any]:
    """One response for each request.

    What takes `HUNG` seconds ends this process, with a traceback in the server's log;
    `radapter-serve` starts it again. From outside nobody could tell that it hangs, where another
    instance of the task answers in its place.
    Where too many requests wait for this model, the first of these are refused: they have waited
    longest.

    Args:
        requests: what Triton gave to `execute`.
        run: the output tensors for each of some requests, or its error.
    """
    refused = surplus.of_this_process.take(len(requests))
    rest = requests[refused:]
    with _watchdog(), _traced(rest):
        results = run(rest)
    return [_response(result) for result in (*[_TOO_MANY] * refused, *results)]


def trace_of_request() -> dict[str, Any]:
    """What a request to another model needs besides, so that its span is inside that of the request
    that runs now; of several that run together, the first that is traced.
    """
    trace = _trace.get()
    return {} if trace is None else {"trace": trace}


@contextlib.contextmanager
def _traced(requests: Sequence[Any]) -> Iterator[None]:
    """Keep the trace of these requests for `trace_of_request`."""
    if otlp_endpoint() is None:
        yield
        return
    traces = (request.trace() for request in requests)
    token = _trace.set(next((trace for trace in traces if trace.get_context()), None))
    try:
        yield
    finally:
        _trace.reset(token)


@contextlib.contextmanager
def _watchdog() -> Iterator[None]:
    """End this process where the work takes `HUNG` seconds."""
    faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _response(result: Mapping[str, NDArray[Any]] | TaskError) -> Any:
    if not isinstance(result, TaskError):
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in result.items()])
    # Triton's name of one of gRPC's statuses is another.
    name = "INVALID_ARG" if result.status == "INVALID_ARGUMENT" else result.status
    code = getattr(pb.TritonError, name)
    return pb.InferenceResponse(error=pb.TritonError(str(result), code))
