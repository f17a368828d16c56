"""Converts results to Triton's responses. Importable only inside Triton's processes."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import triton_python_backend_utils as pb
from numpy.typing import NDArray

from radapter_serve.contract.errors import OVERLOADED, Cancelled, TaskError, until_deadline
from radapter_serve.process import otlp_endpoint
from radapter_serve.triton import backlog

MAX_SECONDS = 120.0  # of work on one request
HUNG = 300.0  # seconds of work on a batch that show a hang: encoders answer within a minute

_trace: ContextVar[Any] = ContextVar("trace", default=None)
_TOO_MANY = TaskError(OVERLOADED, "too many requests wait for this model; ask again later")


def cancelled_by(request: Any) -> Cancelled:
    """Return a function that is true once the caller has left, and raises after the time-out."""
    seconds = min(request.timeout() / 1e6 or MAX_SECONDS, MAX_SECONDS)
    message = f"this request takes more than {seconds:g} s; ask for less at once"
    # Triton knows who has left over gRPC only.
    return until_deadline(lambda: bool(request.is_cancelled()), time.monotonic() + seconds, message)


def answer(
    requests: Sequence[Any],
    run: Callable[[Sequence[Any]], Sequence[Mapping[str, NDArray[Any]] | TaskError]],
) -> list[Any]:
    """Run the requests of an `execute`; return a response for each, with its output tensors or
    error.
    """
    rejected = backlog.of_this_process.take(len(requests))
    rest = requests[rejected:]
    with contextlib.ExitStack() as stack:
        # radapter-serve starts a hung process again, which probes do not notice while another
        # instance answers.
        faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__ or 2)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        if otlp_endpoint() is not None:
            traces = (request.trace() for request in rest)
            trace = next((trace for trace in traces if trace.get_context()), None)
            stack.callback(_trace.reset, _trace.set(trace))
        results = run(rest)
    return [_response(result) for result in (*[_TOO_MANY] * rejected, *results)]


def trace_of_request() -> dict[str, Any]:
    """Argument of a request to another model, for a span below that of the present request."""
    trace = _trace.get()
    return {} if trace is None else {"trace": trace}


def _response(result: Mapping[str, NDArray[Any]] | TaskError) -> Any:
    if not isinstance(result, TaskError):
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in result.items()])
    # Triton's name for one of gRPC's statuses differs.
    name = "INVALID_ARG" if result.status == "INVALID_ARGUMENT" else result.status
    code = getattr(pb.TritonError, name)
    return pb.InferenceResponse(error=pb.TritonError(str(result), code))
