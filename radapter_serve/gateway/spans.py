"""Trace spans of requests, exported with OTLP over HTTP. Imported only if tracing is on;
OpenTelemetry's environment variables choose the endpoint and the sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span as TraceSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from radapter_serve.encoders.encoder import Span
from radapter_serve.gateway.upstream import Entry

_W3C = TraceContextTextMapPropagator()


class Spans:
    """Exports a span for each request; at most 2,048 are buffered, OpenTelemetry's default."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create({SERVICE_NAME: "radapter-serve"})
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("radapter_serve")

    def begin(self, headers: Mapping[str, str], method: str, route: str, entry: Entry) -> TraceSpan:
        """Start the span of a request, in the trace of its `traceparent` header. If the trace is
        sampled, set `entry.traceparent` for the model server.
        """
        carrier = {name: headers[name] for name in _W3C.fields if name in headers}
        span = self._tracer.start_span(
            f"{method} {route}",
            context=_W3C.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route},
        )
        if span.is_recording():
            carrier = {}
            _W3C.inject(carrier, set_span_in_context(span, Context()))
            entry.traceparent = carrier["traceparent"]
        return span

    def end(self, span: TraceSpan, entry: Entry) -> None:
        """End the span with the outcome of the request, and add those of the engine."""
        facts = {
            "radapter.request_id": entry.id,
            "radapter.task": entry.task or "none",
            "radapter.code": entry.code,
        }
        for name in ("release", "adapter", "alpha"):
            if getattr(entry, name) is not None:
                facts[f"radapter.{name}"] = getattr(entry, name)
        span.set_attributes(facts)
        span.set_attribute("http.response.status_code", entry.status)
        span.set_attribute("radapter.queue_ms", entry.queue_ms)
        if entry.status >= 500:
            span.set_status(Status(StatusCode.ERROR))

        def add(parts: Iterable[Span], parent: TraceSpan) -> None:
            for part in parts:
                context = set_span_in_context(parent, Context())
                child = self._tracer.start_span(
                    part.name, context=context, attributes=facts, start_time=part.start
                )
                add(part.parts, child)
                child.end(part.end)

        add(entry.spans, span)
        span.end()

    def close(self, seconds: float) -> None:
        """Export the buffered spans, within `seconds`."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(seconds)
