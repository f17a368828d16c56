"""Why the gateway refuses a request; the codes of the tasks are in `contract/errors.py`."""

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

# All that a caller can get.
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
RETRY_AFTER = 1  # second

# Statuses of HTTP for codes of the tasks that say more than gRPC's status does.
_BY_CODE = {OVERLOADED: 429, RESTARTING: 503, SERVER_STOPPING: 503, TIMED_OUT: 504}

# Statuses of HTTP for those of gRPC.
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 413,
    "UNAVAILABLE": 503,
    "CANCELLED": 503,
    "DEADLINE_EXCEEDED": 504,
}
# What Triton says without a code of ours, and what callers read of it.
_PLAIN: dict[int, tuple[str, str | None]] = {
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
# The same for what passes, by the code of the tasks.
_RETRYABLE = {
    OVERLOADED: "this model has more to do than it can take on; try again in a moment",
    RESTARTING: "a part of the server starts again; try again in a moment",
    SERVER_STOPPING: "the server is stopping; try again in a moment",
}


class Refused(RAdapterError):
    """A request that gets no answer; `str()` is "[code] sentence"."""

    def __init__(
        self,
        status: int,  # of HTTP
        code: str,  # one of `CODES`, or another of a task
        message: str,  # what is wrong, which value, what is allowed
        param: str | None = None,  # the field of the request that is wrong, where one is
        retry_after: int = RETRY_AFTER,  # seconds, after which the same request may be answered
    ) -> None:
        super().__init__(f"[{code}] {message}")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after


def let_go(error: BaseException | None) -> None:
    """Let go of all that was under way when an error was raised, such as a body. A frame that names
    its own error would else keep it until Python looks for cycles.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def bad_request(message: str, param: str | None = None) -> Refused:
    """The refusal of a request that can never be right."""
    return Refused(400, tasks.INVALID_ARGUMENT, message, param)


def overloaded(message: str) -> Refused:
    return Refused(429, OVERLOADED, message)


def timeout_error(status: int, message: str) -> Refused:
    return Refused(status, TIMED_OUT, message)


def from_status(status: str, text: str) -> Refused:
    """What a caller may know of a failure that Triton or an engine reported: its code and its first
    line, without paths.

    Args:
        status: gRPC's name of it, such as INVALID_ARGUMENT.
        text: its message.
    """
    number = _STATUS.get(status, 500)
    failure = read_failure(text)
    if failure.code is not None:
        message = tasks.redact(failure.message) if failure.by_task else _RETRYABLE[failure.code]
        return Refused(_BY_CODE.get(failure.code, number), failure.code, message)
    code, sentence = _PLAIN[number]
    return Refused(number, code, sentence or tasks.redact(failure.message))


def escape(text: str) -> str:
    """What a caller sent, short and printable, for a message."""
    return (
        repr(text if len(text) <= 60 else f"{text[:60]}...")
        .encode("ascii", "backslashreplace")
        .decode()
    )
