"""Records of requests: a line of the log and the metrics, without an image, a text or a key."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from radapter_serve.encoders.encoder import Step
from radapter_serve.gateway.errors import CODES
from radapter_serve.gateway.settings import Log
from radapter_serve.index.facts import OUTDATED, OUTDATED_MEANS

OK = "ok"
GONE = "caller_gone"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds


@dataclass
class Entry:
    """The record of one request."""

    id: str  # `X-Request-Id` of the caller, or a new one
    key: str | None = None  # name of the caller's key
    task: str | None = None  # or "embeddings"; None of requests other than inferences
    release: str | None = None  # that answered
    code: str = OK  # of the refusal, or GONE
    status: int = 200
    bytes_in: int = 0  # of the body
    bytes_out: int = 0
    ms: float = 0.0  # from the headers to the answer
    queue_ms: float = 0.0  # of these, in the gateway's queue
    model_ms: float = 0.0  # of these, in Triton or the engine
    # Of these, in encoders that ran the batch of this request; None in front of Triton.
    encoder_ms: float | None = None
    traceparent: str | None = None  # for the server that computes; not in the log
    steps: list[Step] = field(default_factory=list)  # of an engine; not in the log

    def write(self, log: Log) -> None:
        """Print one line on stderr, in words or as JSON."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        if log == "json":
            hidden = "traceparent", "steps"
            facts = {name: value for name, value in vars(self).items() if name not in hidden}
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


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


class Metrics:
    """The metrics of one gateway. Labels are tasks, codes and names of keys, never what a caller
    sends.
    """

    def __init__(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        """Each gauge, `running`, `waiting` or `body_bytes`, is read when Prometheus asks."""
        self._registry = registry = CollectorRegistry()
        self._seconds = Histogram(
            "radapter_gateway_request_seconds",
            "From a request's headers to its answer",
            ["task"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._requests = Counter(
            "radapter_gateway_requests", "By outcome", ["task", "code"], registry=registry
        )
        self._requests_of_key = Counter(
            "radapter_gateway_key_requests",
            "By the caller's key and outcome",
            ["key", "code"],
            registry=registry,
        )
        self._images_of_key = Counter(
            "radapter_gateway_key_images",
            "Images that were sent with a key",
            ["key"],
            registry=registry,
        )
        meanings = {
            "running": "Requests that Triton works on",
            "waiting": "Requests in the queue",
            "body_bytes": "Bytes of bodies in memory",
        }
        for name, read in gauges.items():
            gauge = Gauge(f"radapter_gateway_{name}", meanings[name], registry=registry)
            gauge.set_function(read)
        # For itself: in front of Triton, which has this metric, there is none.
        self._indexes = CollectorRegistry()
        self._outdated = Gauge(OUTDATED, OUTDATED_MEANS, ["index"], registry=self._indexes)

    def count(self, entry: Entry, seconds: float) -> None:
        """Count an inference by its task, code and key."""
        code = entry.code if entry.code in CODES or entry.code in (OK, GONE) else "other"
        self._requests.labels(entry.task or "none", code).inc()
        if entry.task is not None:
            self._seconds.labels(entry.task).observe(seconds)
        if entry.key is not None:
            self._requests_of_key.labels(entry.key, code).inc()

    def count_images(self, key: str, count: int) -> None:
        self._images_of_key.labels(key).inc(count)

    def text(self, outdated: Mapping[str, bool]) -> bytes:
        """All metrics in the format of Prometheus; `outdated` is that of
        `Upstream.outdated_indexes`.
        """
        text = generate_latest(self._registry)
        if not outdated:
            return text
        self._outdated.clear()
        for index, is_outdated in outdated.items():
            self._outdated.labels(index).set(is_outdated)
        return text + generate_latest(self._indexes)
