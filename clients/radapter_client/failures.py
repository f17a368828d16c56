"""The exceptions, the same over gRPC and HTTP, and the reading of failures that Triton reports,
for the client and for a gateway in front of Triton.

RAdapterClientError
├── ServerUnavailable     no server answers, or it starts, stops, is overloaded or disconnects
├── Unauthorized          the API key is missing or wrong
├── Timeout               no answer within the time-out
├── InvalidRequest        the client or the server refuses the request
│   ├── InvalidImage      the image cannot be read or decoded, or is too large
│   └── InvalidURL        the server URL is malformed
├── ModelNotFound         the server does not serve the model or release, or the release lacks it
└── ServerError           the server failed
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number


class RAdapterClientError(Exception):
    """Base class of every exception that this package raises.

    Args:
        message: a sentence for people.
        code: identifier for programs, such as "invalid_image": the word in brackets before a
            server's message, or None.

    Attributes:
        request_id: ID of the request in the gateway's log; None without a gateway.

    Example: `except RAdapterClientError as error: print(error, error.code, error.request_id)`
    """

    request_id: str | None = None

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ServerUnavailable(RAdapterClientError):
    """No server answers at the URL, or the server starts, stops, is overloaded or disconnects in
    mid-call.

    Raised after up to `retries` further tries within the time-out. `retry_after` is how
    many seconds the server asks you to wait.

    Example: `except ServerUnavailable as error: time.sleep(error.retry_after or 5)`
    """

    retry_after: float = 0.0


class Unauthorized(RAdapterClientError):
    """The API key is missing or wrong, as in `Client("https://HOST",
    api_key="wrong").release()`.
    """


class Timeout(RAdapterClientError):
    """The server did not answer within the time-out, as in `client.classify(image, labels,
    timeout=0.001)`.
    """


class InvalidRequest(RAdapterClientError):
    """The request is wrong, and sending it again will not help, as in `client.classify(image,
    labels=[])`.
    """


class InvalidImage(InvalidRequest):
    """The image cannot be read or decoded, or is too large, as in
    `client.embed_images(["notes.txt"])`.
    """


class InvalidURL(InvalidRequest):
    """The server URL is malformed or has another scheme than the allowed ones, as in
    `Client("localhost:8001")`.
    """


class ModelNotFound(RAdapterClientError):
    """The server does not serve the model or release, as in `Client(release=99).embed_texts(["a
    cat"])`.
    """


class ServerError(RAdapterClientError):
    """The server failed, or its answer cannot be read.

    Example: `except ServerError as error: log.error("the server failed: %s", error)`
    """


def shown(value: object) -> str:
    """Format a value for an error message, in at most 80 characters of one line."""
    if value is None or isinstance(value, (str, bytes, Number)):
        return f"{value!r:.80}"
    return f"a value of type {type(value).__name__}"


def bad_argument(why: str) -> InvalidRequest:
    return InvalidRequest(why, code="invalid_argument")


def bad_image(why: str) -> InvalidImage:
    return InvalidImage(why, code="invalid_image")


@contextmanager
def reading(server: object = "the server") -> Iterator[None]:
    """Raise a `ServerError` for an answer that cannot be read, whatever is wrong with it."""
    try:
        yield
    except RAdapterClientError:
        raise
    except Exception as error:  # recursion, numbers without end, other types than expected, ...
        why = f"{server} answers, but not as Triton does: {error!r:.200}"
        raise ServerError(why) from error


# The exceptions by the code at the start of a server's message.
CODES: dict[str | None, type[RAdapterClientError]] = {
    **dict.fromkeys(("image_too_large", "invalid_image"), InvalidImage),
    **dict.fromkeys(("index_mismatch", "index_replaced", "invalid_argument"), InvalidRequest),
    **dict.fromkeys(("no_labels", "not_calibrated", "not_found"), InvalidRequest),
    **dict.fromkeys(("unknown_adapter", "unknown_index", "unknown_label_set"), InvalidRequest),
    **dict.fromkeys(("overloaded", "rate_limited", "restarting"), ServerUnavailable),
    **dict.fromkeys(("server_stopping", "server_unavailable"), ServerUnavailable),
    **{"no_patch_encoder": ModelNotFound, "timed_out": Timeout},
}
# The exceptions by gRPC's status names and HTTP's status codes.
KINDS: dict[str, type[RAdapterClientError]] = {
    **dict.fromkeys(
        ("INVALID_ARGUMENT", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED", "400", "413", "415"),
        InvalidRequest,
    ),
    **dict.fromkeys(("NOT_FOUND", "404"), ModelNotFound),
    **dict.fromkeys(("UNAVAILABLE", "429", "502", "503"), ServerUnavailable),
    **dict.fromkeys(("DEADLINE_EXCEEDED", "408", "504"), Timeout),
    **dict.fromkeys(("UNAUTHENTICATED", "PERMISSION_DENIED", "401", "403"), Unauthorized),
}
# Triton's messages for a model that cannot answer now, with our codes for them; the same request
# may succeed a little later.
_SIGNS = {
    "Server not ready|Server is stopping|has stopped accepting": "server_stopping",
    r"Stub process\b.* is not healthy|has no available versions|(is|version) not (at )?ready": (
        "restarting"
    ),
    "Exceeds maximum queue size|Request timeout expired|shared memory pool size": "overloaded",
}
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\] ")
_CODE = re.compile(r"(?:^|: )\[([a-z][a-z0-9_]{0,40})\] ")


@dataclass(frozen=True)
class Failure:
    """A failure that Triton reported, without the request ID and the stack trace."""

    code: str | None  # of a task's message, or by `_SIGNS`
    message: str
    by_task: bool  # True if a task wrote the message, for callers to read; False if Triton did


def read_failure(text: str) -> Failure:
    """Parse the text of an error that Triton reports."""
    text = _REQUEST_ID.sub("", text.split("\n\nAt:\n")[0]).strip()
    if match := _CODE.search(text):
        return Failure(match[1], text[match.end() :], by_task=True)
    for sign, code in _SIGNS.items():
        if re.search(sign, text):
            return Failure(code, text, by_task=False)
    return Failure(None, text, by_task=False)


def from_server(status: str, text: str) -> RAdapterClientError:
    """Build the exception for a failure that the server reported, with gRPC's name of its status or
    HTTP's number.
    """
    failure = read_failure(text)
    code = failure.code
    text = failure.message
    kind = CODES.get(code) or KINDS.get(status, ServerError)
    if code in CODES:
        is_full = code in ("overloaded", "rate_limited")
        if kind is ServerUnavailable and not is_full and not failure.by_task:
            text = f"the server is starting or stopping: {text}"
    elif kind is Unauthorized:
        text = (
            f"{text}; give the client api_key=KEY, or radapter-query the environment variable"
            " RADAPTER_API_KEY"
        )
    elif absent := re.search(r"unknown model: '(\w+)' is not found", text):
        text = (
            f"the server has no model {absent[1]!r}: export the release again with this version's"
            " radapter-export"
        )
    elif kind is ModelNotFound:
        text = f"{text}; see what is served with: radapter-query release"
    return kind(text or f"the server answered {status} and no more", code=code)
