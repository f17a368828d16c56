"""What the gateway says of each request: never an image, a text or a key."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radapter_serve.gateway.limits import ConcurrencyLimit
from radapter_serve.gateway.metrics import OK
from radapter_serve.gateway.settings import Log
from radapter_serve.gateway.upstream import Followed

REQUEST_ID = "X-Request-Id"
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


@dataclass
class Entry:
    """One request.

    Attributes:
        id: that the caller sent in `X-Request-Id`, or a new one.
        key: name of the caller's key; None without one.
        task: that was asked, or "embeddings"; None for what is no inference.
        release: that answered; None where none did.
        code: "ok", "caller_gone" or the code of the refusal.
        status: of HTTP.
        bytes_in: of the request's body.
        bytes_out: of the answer's body.
        ms: from the headers to the answer.
        queue_ms: of these, waiting in the gateway for its turn.
        model_ms: of these, in Triton or the engine.
        encoder_ms: of these, in encoders, which run for all requests of a batch; None where Triton
            computes, whose spans tell it.
        followed: what else follows the request; no part of the line.
    """

    id: str
    key: str | None = None
    task: str | None = None
    release: str | None = None
    code: str = OK
    status: int = 200
    bytes_in: int = 0
    bytes_out: int = 0
    ms: float = 0.0
    queue_ms: float = 0.0
    model_ms: float = 0.0
    encoder_ms: float | None = None
    followed: Followed = field(default_factory=Followed)

    def __post_init__(self) -> None:
        self.followed.id = self.id

    def write(self, log: Log, out: Callable[[str], object] | None = None) -> None:
        """Say it as one line, in words or as JSON.

        Args:
            log: how; "off" says nothing.
            out: takes the line; stderr if None.
        """
        if log == "off":
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        if log == "json":
            facts = {name: value for name, value in vars(self).items() if name != "followed"}
            line = json.dumps({"time": now, **facts})
        else:
            encoder = "" if self.encoder_ms is None else f", encoder {self.encoder_ms:.1f}"
            line = (
                f"{now} {self.id} {self.key or '-'} {self.task or '-'} {self.status} {self.code}"
                f" release {self.release or '-'}, {self.bytes_in} bytes in, {self.bytes_out} out,"
                f" {self.ms:.1f} ms (queue {self.queue_ms:.1f}, model {self.model_ms:.1f}"
                f"{encoder})"
            )
        if out is not None:
            out(line)
            return
        print(line, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def timed_slot(limit: ConcurrencyLimit, entry: Entry) -> AsyncIterator[None]:
    """A place among the requests that run; the entry is told how long it was waited for, and how
    long it was taken.

    Args:
        limit: that gives places.
        entry: of the request.

    Raises:
        Refused: too many wait already.
    """
    asked = time.monotonic()
    began = None
    try:
        async with limit.slot():
            began = time.monotonic()
            yield
    finally:
        now = time.monotonic()
        entry.queue_ms = _milliseconds((began or now) - asked)
        entry.model_ms = _milliseconds(now - (began or now))


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


class WithRequestId:
    """An ASGI app that gives every request an id, and its answer the same.

    The id is in `scope["state"]["request_id"]`.

    Args:
        app: that answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        # What may stand in a log and a header, so that no caller writes lines of his own.
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state = {**scope.get("state", {}), "request_id": request_id}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app({**scope, "state": state}, receive, sending)
