"""A collector of traces in this process: takes spans by OTLP over HTTP, as protobuf or as JSON."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span as it came.

    Attributes:
        service: that sent it.
        name: of it.
        trace: its id, in hexadecimal digits.
        id: its own.
        parent: the id of the span around it; empty without one.
        start: in nanoseconds since 1970.
        end: likewise.
        attributes: by name.
    """

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]


class Collector:
    """Keeps the spans that come.

    Attributes:
        url: for `OTEL_EXPORTER_OTLP_ENDPOINT`.
        bodies: of all requests, as they came.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[bytes] = []

    @property
    def spans(self) -> list[Span]:
        """All spans until now."""
        return [
            span
            for body in list(self.bodies)
            for span in (_read_json(body) if body.startswith(b"{") else _read(body))
        ]

    def wait_for(self, *names: str, seconds: float = 30) -> list[Span]:
        """The spans, once there is one of each of these names."""
        end = time.monotonic() + seconds
        while set(names) - {span.name for span in self.spans}:
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.02)
        return self.spans


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                collector.bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


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
