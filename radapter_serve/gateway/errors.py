"""Refusals of the gateway: a status of HTTP, a code and a sentence; the tasks' own codes are in
`contract/errors.py`.
"""

from __future__ import annotations

from radapter_client.failures import read_failure
from radapter_serve.contract import errors as tasks
from radapter_serve.contract.errors import OVERLOADED, RESTARTING, SERVER_STOPPING, TIMED_OUT
from radapter_serve.errors import RAdapterError

UNAUTHORIZED = "unauthorized"
RATE_LIMITED = "rate_limited"
NOT_FOUND = "not_found"
UNKNOWN_MODEL = "unknown_model"
TOO_LARGE = "too_large"
UNSUPPORTED_TYPE = "unsupported_type"
SERVER_UNAVAILABLE = "server_unavailable"

# Every code that a caller can get.
CODES = frozenset(
    {
        UNAUTHORIZED,
        RATE_LIMITED,
        NOT_FOUND,
        UNKNOWN_MODEL,
        TOO_LARGE,
        UNSUPPORTED_TYPE,
        SERVER_UNAVAILABLE,
    }
    | {value for name, value in vars(tasks).items() if name.isupper() and isinstance(value, str)}
)

# HTTP statuses of task codes that say more than the status of gRPC does.
_STATUS_OF_CODE = {OVERLOADED: 429, RESTARTING: 503, SERVER_STOPPING: 503, TIMED_OUT: 504}
_STATUS_OF_GRPC = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 413,
    "UNAVAILABLE": 503,
    "CANCELLED": 503,
    "DEADLINE_EXCEEDED": 504,
}
# Code and message of a failure that Triton reports without a code; None keeps Triton's own message.
_WITHOUT_CODE: dict[int, tuple[str, str | None]] = {
    404: (UNKNOWN_MODEL, None),
    400: (tasks.INVALID_ARGUMENT, None),
    413: (TOO_LARGE, None),
    500: (tasks.INTERNAL_ERROR, "the server failed on this request; its log says why"),
    503: (
        SERVER_UNAVAILABLE,
        "the model server starts, stops or does not answer; try again in a moment",
    ),
    504: (TIMED_OUT, "the request took longer than it may"),
}
# Messages of codes that no task raised itself.
_RETRYABLE = {
    OVERLOADED: "this model has more to do than it can take on; try again in a moment",
    RESTARTING: "a part of the server starts again; try again in a moment",
    SERVER_STOPPING: "the server is stopping; try again in a moment",
}


class Refused(RAdapterError):
    """A request that gets no answer; `str()` is "[code] message"."""

    def __init__(
        self,
        status: int,  # of HTTP
        code: str,  # one of `CODES`, or another of a task
        message: str,  # what is wrong, which value, what is allowed
        param: str | None = None,  # the field of the request that is wrong
        retry_after: int = 1,  # seconds until the same request may be answered
    ) -> None:
        super().__init__(f"[{code}] {message}")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after


def bad_request(message: str, param: str | None = None) -> Refused:
    return Refused(400, tasks.INVALID_ARGUMENT, message, param)


def from_status(status: str, text: str) -> Refused:
    """Translate a failure of Triton or an engine, by its gRPC status and message: the code and the
    first line, without paths.
    """
    number = _STATUS_OF_GRPC.get(status, 500)
    failure = read_failure(text)
    if failure.code is not None:
        message = tasks.redact(failure.message) if failure.by_task else _RETRYABLE[failure.code]
        return Refused(_STATUS_OF_CODE.get(failure.code, number), failure.code, message)
    code, sentence = _WITHOUT_CODE[number]
    return Refused(number, code, sentence or tasks.redact(failure.message))


def escape(text: str) -> str:
    """Quote a caller's text for a message: at most 60 characters, printable ASCII."""
    quoted = repr(text if len(text) <= 60 else f"{text[:60]}...")
    return quoted.encode("ascii", "backslashreplace").decode()
