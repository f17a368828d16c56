"""Spans that the gateway sends of a request."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from radapter_serve.gateway import middleware
from radapter_serve.gateway.access import new_key
from radapter_serve.gateway.settings import Timeouts
from radapter_serve.gateway.spans import Spans
from radapter_serve.gateway.upstream import Entry, Refused
from radapter_serve.process import OTLP_ENDPOINTS
from tests.helpers.collector import Collector, collecting
from tests.helpers.fake_upstream import INFER, TEXT, Served, serving

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTLP_ENDPOINTS:
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def traced(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[tuple[Served, Collector]]:
    """A gateway whose spans have all come after the block."""
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        with serving(**options) as served:
            yield served, collector


def test_a_span_of_each_request_in_the_trace_of_its_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    private = {"inputs": [{**TEXT["inputs"][0], "data": ["a private text"]}]}
    key = new_key(tmp_path / "keys", "the-name-of-a-key")
    with traced(monkeypatch, api_keys=tmp_path / "keys") as (served, collector):
        known = {"Authorization": f"Bearer {key}", "traceparent": f"00-{TRACE}-{CALLER}-01"}
        assert served.ask(INFER, private, **known, X_Request_Id="my-id")[0] == 200
        assert served.ask("/v2/models/no/infer", private, **known)[0] == 404
        # A caller without a key has no span.
        assert served.ask(INFER, private, traceparent=known["traceparent"])[0] == 401
        assert served.ask(INFER, private, **{**known, "Authorization": "Bearer other"})[0] == 401
        served.upstream.error = Refused(503, "server_unavailable", "gone")
        assert served.ask(INFER, private, **known)[0] == 503
        told = served.upstream.entries[-2:]
        served.ask("/v2", **known)
    spans = collector.spans
    assert {(one.trace, one.parent, one.service) for one in spans} == {
        (TRACE, CALLER, "radapter-serve")
    }
    facts = ("radapter.task", "radapter.code", "radapter.release", "http.response.status_code")
    assert [tuple(one.attributes.get(name) for name in facts) for one in spans] == [
        ("embed_text", "ok", "1", 200),
        ("none", "unknown_model", None, 404),
        ("embed_text", "server_unavailable", None, 503),
    ]
    assert spans[0].name == "POST /v2/models/{model}/infer"
    assert spans[0].attributes["radapter.request_id"] == "my-id"
    # Triton is told whose part its own spans are.
    parents = [one.traceparent for one in told]
    assert parents == [f"00-{TRACE}-{span.id}-01" for span in (spans[0], spans[2])]
    sent = b"".join(collector.bodies)
    for secret in (b"private", key.encode(), b"the-name-of-a-key", b"Bearer"):
        assert secret not in sent


def test_a_traceparent_that_is_none_is_ignored_and_a_trace_that_is_not_kept_is_not_sent() -> None:
    class Kept(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            kept.extend(spans)
            return SpanExportResult.SUCCESS

    kept: list[ReadableSpan] = []
    spans = Spans(Kept())
    wrong = [
        *("nonsense", f"00-{TRACE}-{CALLER}", f"ff-{TRACE}-{CALLER}-01", "0" * 30_000),
        *(f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE.upper()}-{CALLER}-01"),
    ]
    entry = Entry("id")
    for text in wrong:
        headers = {"traceparent": text, "tracestate": "\x00,=" * 99}
        spans.end(spans.begin(headers, "POST", "/x", Entry("id")), entry)
    not_kept = spans.begin({"traceparent": f"00-{TRACE}-{CALLER}-00"}, "POST", "/x", entry)
    assert entry.traceparent is None
    spans.end(not_kept, entry)
    spans.close(20)
    assert len(kept) == len(wrong)
    assert all(one.parent is None and one.context.trace_id != int(TRACE, 16) for one in kept)


def test_nobody_takes_the_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(OTLP_ENDPOINTS[0], "http://user:word@127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with serving(timeouts=Timeouts(spans=0.3)) as served:
        for _ in range(3):
            assert served.ask(INFER, TEXT)[0] == 200
            time.sleep(0.05)
        start = time.monotonic()
    assert time.monotonic() - start < 4
    assert caplog.text and "word" not in caplog.text


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert middleware.open_spans() is None and not caplog.messages
    monkeypatch.setenv(OTLP_ENDPOINTS[0], "http://127.0.0.1:1")
    monkeypatch.delitem(sys.modules, "radapter_serve.gateway.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert middleware.open_spans() is None
    [missing] = caplog.messages
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in missing and "[otel]" in missing
