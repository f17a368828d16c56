"""Types shared by the gateway and its upstreams (Triton, or an engine in this process): requests,
their log records, facts about tasks, and refusals. The tasks' error codes are in
`contract/errors.py`; names, types and shapes of tensors in `tasks/table.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any, Protocol

from numpy.typing import NDArray

from radapter_client import Reply
from radapter_client.failures import read_failure
from radapter_serve.contract import errors as tasks
from radapter_serve.contract.errors import (
    INTERNAL_ERROR,
    INVALID_ARGUMENT,
    OVERLOADED,
    RESTARTING,
    RETRYABLE,
    SERVER_STOPPING,
    TIMED_OUT,
    UNKNOWN_MODEL,
    redact,
)
from radapter_serve.encoders.encoder import Span
from radapter_serve.errors import RAdapterError
from radapter_serve.tasks.table import TASKS, Tensor, outputs_of

LOG = logging.getLogger("radapter-gateway")
SHORT_TIMEOUT = 10.0  # seconds for a request that needs no encoder
SMALL = 2**16  # bytes that the event loop reads or writes itself; threads do what is larger

# Refusals

UNAUTHORIZED = "unauthorized"
RATE_LIMITED = "rate_limited"
NOT_FOUND = "not_found"
TOO_LARGE = "too_large"
UNSUPPORTED_TYPE = "unsupported_type"
SERVER_UNAVAILABLE = "server_unavailable"

# Every code that a caller can get: the gateway's and the tasks'.
CODES = frozenset(
    {UNAUTHORIZED, RATE_LIMITED, NOT_FOUND, TOO_LARGE, UNSUPPORTED_TYPE, SERVER_UNAVAILABLE}
    | {value for name, value in vars(tasks).items() if name.isupper() and isinstance(value, str)}
)

# HTTP statuses of task codes, where they are more precise than the status of gRPC.
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
# Code and message, by HTTP status, of a failure that Triton reports without a code; None keeps
# Triton's message.
_WITHOUT_CODE: dict[int, tuple[str, str | None]] = {
    404: (UNKNOWN_MODEL, None),
    400: (INVALID_ARGUMENT, None),
    413: (TOO_LARGE, None),
    500: (INTERNAL_ERROR, "the server failed on this request; its log says why"),
    503: (
        SERVER_UNAVAILABLE,
        "the model server starts, stops or does not answer; try again in a moment",
    ),
    504: (TIMED_OUT, "the request took longer than it may"),
}


class Refused(RAdapterError):
    """The error of a refused request; `str()` is "[code] message"."""

    def __init__(
        self,
        status: int,  # HTTP status
        code: str,  # one of `CODES`, or another code of a task
        message: str,  # the mistake, its value, and the allowed values
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
    return Refused(400, INVALID_ARGUMENT, message, param)


def from_status(status: str, text: str) -> Refused:
    """Translate a failure of Triton or an engine into a refusal, whose message has no paths."""
    number = _STATUS_OF_GRPC.get(status, 500)
    failure = read_failure(text)
    if failure.code is not None:
        message = redact(failure.message)
        if not failure.by_task:
            message = RETRYABLE[failure.code].format("this model")
        return Refused(_STATUS_OF_CODE.get(failure.code, number), failure.code, message)
    code, sentence = _WITHOUT_CODE[number]
    return Refused(number, code, sentence or redact(failure.message))


# Requests, and facts about the tasks

IMAGES = {"image", "examples"}  # inputs of type BYTES that hold files
_PATH = re.compile(r"((?:[\w-]+:)?)([/~].*|(?<=local-dir:).*)", re.DOTALL)


@dataclass(frozen=True)
class Inference:
    """A checked request to a task; arrays of type BYTES hold texts, str or UTF-8, or images."""

    model: str
    version: str  # empty for the newest
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] = ()  # names of the wanted outputs; all if empty
    id: str = ""  # the caller's request id, which the answer repeats
    binary: frozenset[str] = frozenset()  # outputs that the caller wants in binary
    timeout: float | None = None  # seconds that the caller allows
    size: int = 0  # bytes of the inputs
    answer_size: int = 0  # most bytes of the answer
    is_probe: bool = False  # asked by the gateway itself, to try a task

    @property
    def adapters(self) -> set[str]:
        """The adapters that its rows name; empty for the release itself."""
        if "adapter" not in self.inputs:
            return {""}
        names = self.inputs["adapter"].ravel().tolist()
        return {name.decode() if isinstance(name, bytes) else name for name in names}

    @property
    def images(self) -> int:
        """The number of images, without empty examples."""
        arrays = (array for name, array in self.inputs.items() if name in IMAGES)
        return sum(1 for array in arrays for value in array.ravel() if value)


@dataclass(frozen=True)
class ServedModel:
    """A task as callers see it; `releases` maps names of config parameters to the facts of a
    release.
    """

    name: str
    max_batch_size: int  # rows of a request; 0 where tensors have no batch dimension
    outputs: Mapping[str, Tensor]
    releases: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, task: str, releases: Mapping[str, str]) -> ServedModel:
        """Make the model of a task from its releases' facts in JSON; the newest is named `release`.
        Paths of the machine that exported them are cut to their last name.
        """

        def without_paths(value: Any) -> Any:
            if isinstance(value, dict):
                # A slash in a template does not make it a path.
                return {
                    key: item if key == "templates" else without_paths(item)
                    for key, item in value.items()
                }
            if isinstance(value, list):
                return [without_paths(item) for item in value]
            if not isinstance(value, str):
                return value
            path = _PATH.fullmatch(value)
            return redact(value) if path is None else path[1] + PurePosixPath(path[2]).name

        public = {name: without_paths(json.loads(facts)) for name, facts in releases.items()}
        newest = public.get("release", {})
        rows = int(newest.get("max_batch_size", 64)) if TASKS[task].batched else 0
        outputs = outputs_of(task, int(newest.get("embed_dim", -1)))
        return cls(task, rows, outputs, public)

    def facts(self) -> dict[int, dict[str, Any]]:
        """Facts of the releases by version."""
        return {int(facts["version"]): facts for facts in self.releases.values()}

    def config(self) -> dict[str, Any]:
        """The response to `/config`, in Triton's form."""

        def described(tensor: Tensor) -> dict[str, Any]:
            kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
            return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.dims)}

        return {
            "name": self.name,
            "max_batch_size": self.max_batch_size,
            "input": [
                {**described(tensor), "optional": tensor.optional}
                for tensor in TASKS[self.name].inputs.values()
            ],
            "output": [described(tensor) for tensor in self.outputs.values()],
            "parameters": {
                name: {"string_value": json.dumps(facts)} for name, facts in self.releases.items()
            },
        }

    def metadata(self) -> dict[str, Any]:
        """The response to `/v2/models/MODEL`, in KServe's form."""
        batch = [-1] if self.max_batch_size else []

        def described(tensor: Tensor) -> dict[str, Any]:
            shape = [*batch, *tensor.dims]
            return {"name": tensor.name, "datatype": tensor.datatype, "shape": shape}

        return {
            "name": self.name,
            "versions": list(map(str, sorted(self.facts()))),
            "platform": "python",
            "inputs": list(map(described, TASKS[self.name].inputs.values())),
            "outputs": list(map(described, self.outputs.values())),
        }


@dataclass
class Entry:
    """The log record of one request."""

    id: str  # `X-Request-Id` of the caller, or a new one
    key: str | None = None  # name of the caller's key
    task: str | None = None  # "embeddings" for OpenAI's; None if not an inference
    release: str | None = None  # version that answered
    adapter: str | None = None  # that was asked; None for the release itself
    alpha: float | None = None  # of the answer's receipt; None if rows have several
    code: str = "ok"  # or the code of the refusal, or "caller_gone"
    status: int = 200
    bytes_in: int = 0  # of the body
    bytes_out: int = 0
    ms: float = 0.0  # from the headers to the answer
    queue_ms: float = 0.0  # of these, in the gateway's queue
    model_ms: float = 0.0  # of these, in Triton or the engine
    # Of these, in encoders that ran the batch of this request; None in front of Triton.
    encoder_ms: float | None = None
    traceparent: str | None = None  # for the model server; not in the log
    spans: list[Span] = field(default_factory=list)  # of the engine; not in the log

    def write(self) -> None:
        """Print a line of JSON on stderr."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        facts: dict[str, Any] = {"time": now}
        for name, value in vars(self).items():
            if name not in ("traceparent", "spans"):
                facts[name] = round(value, 3) if isinstance(value, float) else value
        # A request is answered, too, if its line can't be written, such as on a full disk.
        with contextlib.suppress(OSError):
            print(json.dumps(facts), file=sys.stderr, flush=True)


class Upstream(Protocol):
    """Backend of a gateway. Methods raise only `Refused`; if cancelled, so is their request."""

    async def infer(self, request: Inference, timeout: float, entry: Entry) -> Reply:
        """Answer within `timeout` seconds; `entry` has the request's id and trace, and collects the
        spans of an engine.
        """

    async def config(self, model: str, version: str = "") -> ServedModel:
        """Inputs, outputs and releases of a task."""

    async def ready(self, model: str, version: str = "") -> bool: ...

    async def close(self) -> None: ...
