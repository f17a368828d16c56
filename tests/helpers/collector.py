"""A collector of traces in this process: takes spans by OTLP over HTTP, as protobuf or as JSON."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.helpers.fake_upstream import until
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


def of_name(spans: Sequence[Span], name: str) -> Span:
    """The one span of this name."""
    [span] = [span for span in spans if span.name == name]
    return span


def check_inside(span: Span, parent: Span) -> None:
    """Check that a span is in another, by its ids and its times."""
    assert (span.parent, span.trace) == (parent.id, parent.trace)
    assert parent.start <= span.start <= span.end <= parent.end


@dataclass
class Collector:
    """Keeps the spans that come; `url` is for `OTEL_EXPORTER_OTLP_ENDPOINT`."""

    url: str
    requests: list[Any]

    @property
    def bodies(self) -> list[bytes]:
        """Of all requests that bring traces, as they came."""
        return [body for _, path, _, body, _ in list(self.requests) if path == "/v1/traces"]

    @property
    def spans(self) -> list[Span]:
        """All spans until now."""
        return [span for body in self.bodies for span in _read(body)]

    def wait_for(self, *names: str, trace: str) -> list[Span]:
        """The spans of a trace, once there is one of each of these names."""

        def spans() -> list[Span]:
            return [span for span in self.spans if span.trace == trace]

        until(lambda: set(names) <= {span.name for span in spans()}, 40)
        return spans()


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port, until the end of the block."""
    with http_server(200, b"") as (url, requests):
        yield Collector(url, requests)


def _read(body: bytes) -> Iterator[Span]:
    message = ExportTraceServiceRequest()
    is_json = body.startswith(b"{")
    if is_json:
        json_format.Parse(body, message, ignore_unknown_fields=True)
    else:
        message.ParseFromString(body)

    def digits(number: bytes) -> str:
        # JSON has the digits themselves, which protobuf took for base64.
        return base64.b64encode(number).decode() if is_json else number.hex()

    for resource in message.resource_spans:
        service = _attributes(resource.resource.attributes).get("service.name", "")
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            yield Span(
                service,
                span.name,
                digits(span.trace_id),
                digits(span.span_id),
                digits(span.parent_span_id),
                span.start_time_unix_nano,
                span.end_time_unix_nano,
                _attributes(span.attributes),
            )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value")
        for pair in pairs
    }
