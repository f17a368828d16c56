"""A collector of traces in this process: takes spans by OTLP over HTTP, as protobuf or as JSON."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.helpers.stand_ins import http_server


@dataclass(frozen=True)
class Span:
    """A span as it came; ids are hexadecimal digits, times nanoseconds since 1970."""

    service: str
    name: str
    trace: str
    id: str
    parent: str  # id of the span around it; empty without one
    start: int
    end: int
    attributes: dict[str, Any]


class Collector:
    """Keeps the spans that come; `url` is for `OTEL_EXPORTER_OTLP_ENDPOINT`."""

    def __init__(self, url: str, seen: list[Any]) -> None:
        self.url = url
        self._seen = seen

    @property
    def bodies(self) -> list[bytes]:
        """Of all requests that bring traces, as they came."""
        return [body for _, path, _, body, _ in list(self._seen) if path == "/v1/traces"]

    @property
    def spans(self) -> list[Span]:
        """All spans until now."""
        return [
            span
            for body in self.bodies
            for span in (_read_json(body) if body.startswith(b"{") else _read(body))
        ]

    def wait_for(self, *names: str, trace: str, seconds: float = 30) -> list[Span]:
        """The spans of a trace, once there is one of each of these names."""
        end = time.monotonic() + seconds
        while True:
            spans = [span for span in self.spans if span.trace == trace]
            if not set(names) - {span.name for span in spans}:
                return spans
            assert time.monotonic() < end, [span.name for span in spans]
            time.sleep(0.02)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port, until the end of the block."""

    with http_server(200, b"") as (url, seen):
        yield Collector(url, seen)


def _read(body: bytes) -> Iterator[Span]:
    message = ExportTraceServiceRequest.FromString(body)
    for resource in message.resource_spans:
        service = _attributes(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service,
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _attributes(span.attributes),
                )


def _read_json(body: bytes) -> Iterator[Span]:
    for resource in json.loads(body)["resourceSpans"]:
        service = _json_attributes(resource["resource"]["attributes"])["service.name"]
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                yield Span(
                    service,
                    span["name"],
                    span["traceId"],
                    span["spanId"],
                    span.get("parentSpanId", ""),
                    int(span["startTimeUnixNano"]),
                    int(span["endTimeUnixNano"]),
                    _json_attributes(span.get("attributes", [])),
                )


def _json_attributes(given: Any) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values()), "") for one in given}


def _attributes(given: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in given}
