"""The exceptions, the same over gRPC and HTTP.

RAdapterClientError
├── ServerUnavailable     no server answers, or it starts, stops, is overloaded or went away
├── Unauthorized          the server wants an API key, or another one
├── Timeout               no answer within the time-out
├── InvalidRequest        the request was wrong, here or in the server's eyes
│   ├── InvalidImage      an image that cannot be read, decoded or is too large
│   └── InvalidURL        a server URL that cannot be read
├── ModelNotFound         a model or release that the server does not serve, or the release lacks
└── ServerError           the server failed
"""

from __future__ import annotations

from numbers import Number


class RAdapterClientError(Exception):
    """The base of every exception that this package raises.

    Args:
        message: a sentence for people.
        code: what programs can rely on, such as "invalid_image": the word in brackets before a
            server's sentence, or None.

    Attributes:
        request_id: by which the gateway's log names the request; None without a gateway.

    Example: `except RAdapterClientError as error: print(error, error.code, error.request_id)`
    """

    request_id: str | None = None

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ServerUnavailable(RAdapterClientError):
    """Nobody answers at the URL, or the server starts, stops, has too much to do or went away in
    mid-call.

    The client has tried again by then, `retries` times. `retry_after` is how many seconds the
    server wants you to wait.

    Example: `except ServerUnavailable as error: time.sleep(error.retry_after or 5)`
    """

    retry_after: float = 0.0


class Unauthorized(RAdapterClientError):
    """The server wants an API key, or another one, as in `Client("https://HOST",
    api_key="wrong").release()`.
    """


class Timeout(RAdapterClientError):
    """The server did not answer within the time-out, as in `client.classify(image, labels,
    timeout=0.001)`.
    """


class InvalidRequest(RAdapterClientError):
    """The request was wrong, and sending it again will not help, as in `client.classify(image,
    labels=[])`.
    """


class InvalidImage(InvalidRequest):
    """An image that cannot be read or decoded, or is too large, as in
    `client.embed_images(["notes.txt"])`.
    """


class InvalidURL(InvalidRequest):
    """A server URL without an allowed scheme, or otherwise no server's address, as in
    `Client("localhost:8001")`.
    """


class ModelNotFound(RAdapterClientError):
    """A model or release that the server does not serve, as in `Client(release=99).embed_texts(["a
    cat"])`.
    """


class ServerError(RAdapterClientError):
    """The server failed, or answered with something that is no answer.

    Example: `except ServerError as error: log.error("the server failed: %s", error)`
    """


def shown(value: object) -> str:
    """A value as a message names it, short and on one line: what is neither a text nor a number, by
    its type.
    """
    if value is None or isinstance(value, (str, bytes, Number)):
        return f"{value!r:.80}"
    return f"a value of type {type(value).__name__}"


def bad_argument(why: str) -> InvalidRequest:
    return InvalidRequest(why, code="invalid_argument")


def bad_image(why: str) -> InvalidImage:
    return InvalidImage(why, code="invalid_image")


# The exceptions for the codes that a server writes before its sentence.
CODES: dict[str | None, type[RAdapterClientError]] = {
    **dict.fromkeys(("image_too_large", "invalid_image"), InvalidImage),
    **dict.fromkeys(("index_mismatch", "index_replaced", "invalid_argument"), InvalidRequest),
    **dict.fromkeys(("no_labels", "not_calibrated", "not_found"), InvalidRequest),
    **dict.fromkeys(("unknown_index", "unknown_label_set"), InvalidRequest),
    **dict.fromkeys(("overloaded", "rate_limited", "restarting"), ServerUnavailable),
    **dict.fromkeys(("server_stopping", "server_unavailable"), ServerUnavailable),
    **{"no_patch_encoder": ModelNotFound, "timed_out": Timeout},
}
# gRPC's names and HTTP's numbers of the same failures.
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
