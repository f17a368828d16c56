"""Errors as Triton reports them, read alike by the client and by a gateway in front of Triton."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._exceptions import (
    CODES,
    KINDS,
    ModelNotFound,
    RAdapterClientError,
    ServerError,
    ServerUnavailable,
    Unauthorized,
)

# Triton's messages for a model that cannot answer now, and the code that the tasks have for it: the
# same request may succeed a little later.
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
    """A failure as Triton reported it, without the id of the request and the stack trace."""

    code: str | None  # of a task, or that of one of `_SIGNS`
    message: str
    by_task: bool  # whether a task wrote the message, for callers to read, and not Triton


def read_failure(text: str) -> Failure:
    """Read the text of an error of Triton's."""
    text = _REQUEST_ID.sub("", text.split("\n\nAt:\n")[0]).strip()
    if match := _CODE.search(text):
        return Failure(match[1], text[match.end() :], by_task=True)
    for sign, code in _SIGNS.items():
        if re.search(sign, text):
            return Failure(code, text, by_task=False)
    return Failure(None, text, by_task=False)


def from_server(status: str, text: str) -> RAdapterClientError:
    """The exception for a failure that the server reported: gRPC's name of the status
    ("INVALID_ARGUMENT") or HTTP's number ("400"), and its message, perhaps with a code in brackets.
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
