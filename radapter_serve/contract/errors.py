"""Errors of a request, with a code for programs and a sentence for people; checks of its α."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError

# The codes are part of the interface: clients tell errors apart with them.
INVALID_IMAGE = "invalid_image"
IMAGE_TOO_LARGE = "image_too_large"
UNKNOWN_LABEL_SET = "unknown_label_set"
UNKNOWN_ADAPTER = "unknown_adapter"
ADAPTER_FAILED = "adapter_failed"
NO_LABELS = "no_labels"
INVALID_ARGUMENT = "invalid_argument"
NO_PATCH_ENCODER = "no_patch_encoder"
NOT_CALIBRATED = "not_calibrated"
UNKNOWN_INDEX = "unknown_index"
INDEX_MISMATCH = "index_mismatch"
INDEX_REPLACED = "index_replaced"
ENCODER_FAILED = "encoder_failed"
CANCELLED = "cancelled"
INTERNAL_ERROR = "internal_error"
UNKNOWN_MODEL = "unknown_model"
SERVER_STOPPING = "server_stopping"
# The same request may succeed a little later: a part of the server is restarting or overloaded.
RESTARTING = "restarting"
OVERLOADED = "overloaded"
RETRYABLE = {  # messages by code; {} is the name of a model
    SERVER_STOPPING: "the server is stopping; ask again when it is back",
    RESTARTING: "{} is being started again; ask again in a few seconds",
    OVERLOADED: (
        "{} has more to do than it can take on; ask again in a moment, with fewer requests at once"
    ),
}
# The request took too long, and would take too long again.
TIMED_OUT = "timed_out"

Cancelled = Callable[[], bool]  # True if the caller of a request has given up
Alpha = NDArray[np.float32]  # [B, 1], an α for each row
# Maps rows to embeddings; takes `Alpha` as a second argument if α is an input.
Encode = Callable[..., NDArray[np.float32]]

_PRIVATE = re.compile(r"['\"]?(?<![\w.])/\S+|\S*radapter_serve_\w+\S*")

# gRPC status by code; all other codes have INVALID_ARGUMENT.
_STATUS = {
    ADAPTER_FAILED: "INTERNAL",
    ENCODER_FAILED: "INTERNAL",
    INTERNAL_ERROR: "INTERNAL",
    CANCELLED: "CANCELLED",
    UNKNOWN_MODEL: "NOT_FOUND",
    SERVER_STOPPING: "UNAVAILABLE",
    RESTARTING: "UNAVAILABLE",
    OVERLOADED: "UNAVAILABLE",
}


class TaskError(RAdapterError):
    """A request that cannot be answered, "[code] sentence"; `advice` is for callers of a server."""

    def __init__(self, code: str, what: str, advice: str = "") -> None:
        message = f"{what}; {advice}" if advice else what
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message
        self.what = what

    @property
    def status(self) -> str:
        """Name of the gRPC status, such as INVALID_ARGUMENT."""
        return _STATUS.get(self.code, "INVALID_ARGUMENT")


def invalid(message: str) -> TaskError:
    """An `invalid_argument` error: the request has a value that is not allowed."""
    return TaskError(INVALID_ARGUMENT, message)


def task_error(error: Exception) -> TaskError:
    """Convert an error for the caller; any but a `TaskError` is a bug, which is logged."""
    if not isinstance(error, TaskError):
        traceback.print_exception(error, file=sys.stderr)
        message = "the server failed on this request; its log says why"
        return TaskError(INTERNAL_ERROR, message)
    # Drop the traceback and the causes, whose frames may hold an image.
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def check_cancelled(cancelled: Cancelled | None) -> None:
    """Raise a `TaskError` if the caller has given up, so that work on the request ends."""
    if cancelled is not None and cancelled():
        raise TaskError(CANCELLED, "the caller gave up")


def until_deadline(cancelled: Cancelled, deadline: float, message: str) -> Cancelled:
    """Return `cancelled` with a check before it: after the deadline, in seconds of
    `time.monotonic`, it raises a `TaskError` with this message.
    """

    def check() -> bool:
        if time.monotonic() > deadline:
            raise TaskError(TIMED_OUT, message)
        return cancelled()

    return check


def redact(message: str) -> str:
    """The first line of an error message, without paths and names of shared memory."""
    return _PRIVATE.sub("...", message.strip().partition("\n")[0])


def check_alpha(alpha: float) -> None:
    """Refuse an α outside [0, 1]."""
    if not 0 <= alpha <= 1:  # NaN fails too
        raise RAdapterError(
            f"alpha is {alpha:g}; allowed: 0 (the base) to 1 (all that was learned)"
        )


def request_alpha(alpha: float | None, release_alpha: float, *, dynamic: bool) -> float | None:
    """The α to pass to the encoders for a request, any if `dynamic`; None if α is folded."""
    used = float(np.float32(release_alpha if alpha is None else alpha))
    try:
        check_alpha(used)
    except RAdapterError as error:
        raise invalid(str(error)) from None
    if dynamic:
        return used
    if used != np.float32(release_alpha):
        raise invalid(
            f"alpha is {used:g}, but this release was exported at alpha {release_alpha:g};"
            " radapter-export --alpha dynamic makes one that takes any"
        )
    return None
