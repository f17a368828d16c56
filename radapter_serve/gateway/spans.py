"""The spans of requests, sent by OTLP over HTTP; imported only where traces are asked for.

Variables of the environment say where they go and which are kept, as OpenTelemetry has them.
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

from radapter_serve.encoders.steps import Step
from radapter_serve.environment import otlp_endpoint
from radapter_serve.gateway.journal import Entry
from radapter_serve.gateway.upstream import LOG

_W3C = TraceContextTextMapPropagator()
_HEADERS = ("traceparent", "tracestate")


class Spans:
    """Sends a span for each request, with those of the steps that an engine took for it.

    Those that wait to be sent are in memory, 2,048 by OpenTelemetry's default; more are dropped.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        # What it would say, again and again, `_Warning` says once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "radapter-serve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = _Warning(exporter or OTLPSpanExporter())
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("radapter_serve")

    def begin(self, headers: Mapping[str, str], method: str, route: str) -> RequestSpan:
        """The span of a request that has come; a part of its caller's trace, if its headers name
        one as W3C's Trace Context does. A route has names in place of what callers write.
        """
        carrier = {name: headers[name] for name in _HEADERS if name in headers}
        span = self._tracer.start_span(
            f"{method} {route}",
            context=_W3C.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": route},
        )
        return RequestSpan(self._tracer, span)

    def close(self, seconds: float) -> None:
        """Send what waits, for so many seconds at most; trying to end it then takes half as long
        again at most.
        """
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():  # nobody answers: let it no longer try again
            self._exporter.shutdown()
            closing.join(seconds / 2)


class RequestSpan:
    """The span of one request, and the `traceparent` for whoever computes the answer, None where
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
        """End it with what became of the request."""
        if not self._span.is_recording():
            self._span.end()
            return
        facts = {
            "radapter.request_id": entry.id,
            "radapter.task": entry.task or "none",
            "radapter.code": entry.code,
        }
        if entry.release is not None:
            facts["radapter.release"] = entry.release
        self._span.set_attributes(facts)
        self._span.set_attribute("http.response.status_code", entry.status)
        self._span.set_attribute("radapter.queue_ms", entry.queue_ms)
        if entry.status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._add(entry.followed.steps, self._span, facts)
        self._span.end()

    def _add(self, steps: Iterable[Step], parent: Span, facts: dict[str, str]) -> None:
        for one in steps:
            span = self._tracer.start_span(
                one.name,
                context=set_span_in_context(parent, Context()),
                attributes=facts,
                start_time=one.start,
            )
            self._add(one.parts, span, facts)
            span.end(one.end)


class _Warning(SpanExporter):
    """An exporter that says in one line that nobody takes spans, until somebody does again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception:  # such as a URL that is none
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
