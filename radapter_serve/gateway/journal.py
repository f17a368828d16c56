"""What the gateway says of each request: never an image, a text or a key."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

from radapter_serve.gateway.limits import ConcurrencyLimit
from radapter_serve.gateway.metrics import OK
from radapter_serve.gateway.settings import Log
from radapter_serve.gateway.upstream import Followed


@dataclass
class Entry:
    """What became of one request."""

    id: str  # that the caller sent in `X-Request-Id`, or a new one
    key: str | None = None  # the name of it
    task: str | None = None  # that was asked, or "embeddings"; None for what is no inference
    release: str | None = None  # that answered
    code: str = OK  # else that of the refusal, or GONE
    status: int = 200
    bytes_in: int = 0  # of the body
    bytes_out: int = 0
    ms: float = 0.0  # from the headers to the answer
    queue_ms: float = 0.0  # of these, waiting in the gateway for its turn
    model_ms: float = 0.0  # of these, in Triton or the engine
    # Of these, in encoders, which run for all requests of a batch; None where Triton computes,
    # whose spans tell it.
    encoder_ms: float | None = None
    followed: Followed = field(default_factory=Followed)  # no part of the line

    def __post_init__(self) -> None:
        self.followed.id = self.id

    def write(self, log: Log) -> None:
        """Say it on stderr as one line, in words or as JSON."""
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
        print(line, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def timed_slot(limit: ConcurrencyLimit, entry: Entry) -> AsyncIterator[None]:
    """A place among the requests that run; the entry is told how long it was waited for, and how
    long it was taken.
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
