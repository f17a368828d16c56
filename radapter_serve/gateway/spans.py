"""Spans of requests by OTLP over HTTP; imported only where traces are wanted. OpenTelemetry's own
variables of the environment say where spans go, and which are kept.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from radapter_serve.encoders.encoder import Step
from radapter_serve.gateway.upstream import LOG, Entry
from radapter_serve.process import otlp_endpoint

_W3C = TraceContextTextMapPropagator()


class Spans:
    """Sends a span of each request; at most 2,048 wait in memory, OpenTelemetry's default."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        # Its repeated complaints; `_WarnOnce` has one line instead.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "radapter-serve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = _WarnOnce(exporter or OTLPSpanExporter())
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("radapter_serve")

    def begin(self, headers: Mapping[str, str], method: str, route: str) -> RequestSpan:
        """Begin the span of a request, in the trace that its headers name."""
        carrier = {name: headers[name] for name in _W3C.fields if name in headers}
        span = self._tracer.start_span(
            f"{method} {route}",
            context=_W3C.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route},
        )
        return RequestSpan(self._tracer, span)

    def close(self, seconds: float) -> None:
        """Send the spans that wait, for so many seconds, and give up after half as long again."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            self._exporter.shutdown()
            closing.join(seconds / 2)


class RequestSpan:
    """The span of one request; `traceparent` is for the server that computes the answer, None where
    this trace is not kept.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        carrier: dict[str, str] = {}
        if span.is_recording():
            _W3C.inject(carrier, set_span_in_context(span, Context()))
        self.traceparent = carrier.get("traceparent")

    def end(self, entry: Entry) -> None:
        """End the span with what became of the request, and add the steps of an engine."""
        span = self._span
        if not span.is_recording():
            span.end()
            return
        facts = {
            "radapter.request_id": entry.id,
            "radapter.task": entry.task or "none",
            "radapter.code": entry.code,
        }
        if entry.release is not None:
            facts["radapter.release"] = entry.release
        span.set_attributes(facts)
        span.set_attribute("http.response.status_code", entry.status)
        span.set_attribute("radapter.queue_ms", entry.queue_ms)
        if entry.status >= 500:
            span.set_status(Status(StatusCode.ERROR))

        def add(steps: Iterable[Step], parent: Span) -> None:
            for step in steps:
                context = set_span_in_context(parent, Context())
                part = self._tracer.start_span(
                    step.name, context=context, attributes=facts, start_time=step.start
                )
                add(step.parts, part)
                part.end(step.end)

        add(entry.steps, span)
        span.end()


class _WarnOnce(SpanExporter):
    """Warns once when the collector takes no spans, until it takes some again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:  # such as a malformed URL
            result = SpanExportResult.FAILURE
        fails = result != SpanExportResult.SUCCESS
        if fails and not self._fails:
            LOG.warning(
                "the collector of %s takes no spans; requests are answered without", otlp_endpoint()
            )
        self._fails = fails
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
