"""Spans of one request: of the gateway, of an engine in it, of Triton inside it, and the
milliseconds of the same spans in the log.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import urllib3
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from radapter_serve.gateway import middleware
from radapter_serve.gateway.access import new_key
from radapter_serve.gateway.settings import Timeouts
from radapter_serve.gateway.spans import Spans
from radapter_serve.gateway.upstream import Entry, Refused
from radapter_serve.process import OTLP_ENDPOINTS
from tests.helpers.asking import needs_triton, tritonserver
from tests.helpers.collector import check_inside, collecting, of_name
from tests.helpers.fake_upstream import INFER, TEXT, serving
from tests.helpers.gateway import gateway
from tests.helpers.small_release import png
from tests.helpers.ways import in_process

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
KEPT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTLP_ENDPOINTS:
        monkeypatch.delenv(name, raising=False)


def test_a_span_of_each_request_in_the_trace_of_its_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    private = {"inputs": [{**TEXT["inputs"][0], "data": ["a private text"]}]}
    key = new_key(tmp_path / "keys", "the-name-of-a-key")
    known = {"Authorization": f"Bearer {key}", **KEPT}
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        with serving(api_keys=tmp_path / "keys") as served:
            assert served.ask(INFER, private, **known, X_Request_Id="my-id")[0] == 200
            assert served.ask("/v2/models/no/infer", private, **known)[0] == 404
            # A caller without a key has no span.
            assert served.ask(INFER, private, **KEPT)[0] == 401
            assert served.ask(INFER, private, **KEPT, Authorization="Bearer other")[0] == 401
            served.upstream.error = Refused(503, "server_unavailable", "gone")
            assert served.ask(INFER, private, **known)[0] == 503
            told = served.upstream.entries[-2:]
            served.ask("/v2", **known)
    spans = collector.spans
    assert {(span.trace, span.parent, span.service) for span in spans} == {
        (TRACE, CALLER, "radapter-serve")
    }
    facts = ("radapter.task", "radapter.code", "radapter.release", "http.response.status_code")
    assert [tuple(span.attributes.get(name) for name in facts) for span in spans] == [
        ("embed_text", "ok", "1", 200),
        ("none", "unknown_model", None, 404),
        ("embed_text", "server_unavailable", None, 503),
    ]
    assert spans[0].name == "POST /v2/models/{model}/infer"
    asked = [spans[0].attributes[f"http.{name}"] for name in ("request.method", "route")]
    assert asked == ["POST", "/v2/models/{model}/infer"]
    assert spans[0].attributes["radapter.request_id"] == "my-id"
    # Triton is told whose part its own spans are.
    parents = [span.traceparent for span in told]
    assert parents == [f"00-{TRACE}-{span.id}-01" for span in (spans[0], spans[2])]
    sent = b"".join(collector.bodies)
    for secret in (b"private", key.encode(), b"the-name-of-a-key", b"Bearer"):
        assert secret not in sent


def test_a_traceparent_that_is_none_is_ignored_and_a_trace_that_is_not_kept_is_not_sent() -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
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
    kept = exporter.get_finished_spans()
    assert len(kept) == len(wrong)
    assert all(span.parent is None and span.context.trace_id != int(TRACE, 16) for span in kept)


def test_nobody_takes_the_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(OTLP_ENDPOINTS[0], "http://user:word@127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(timeouts=Timeouts(spans=0.1)) as served:
        for _ in range(3):
            assert served.ask(INFER, TEXT)[0] == 200
            time.sleep(0.03)
        start = time.monotonic()
    assert time.monotonic() - start < 4
    assert caplog.text and "word" not in caplog.text
    # The exporter draws its next try from the `random` that tests with hypothesis must have alone.
    for thread in threading.enumerate():
        if thread.name == "spans":
            thread.join(20)
            assert not thread.is_alive()


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


# An engine in this process


def classify(url: str, **headers: str) -> None:
    """Classify an image by the labels "b" and "secret"."""
    image = base64.b64encode(png(3)).decode()
    inputs = [
        {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [image]},
        {"name": "labels", "shape": [1, 2], "datatype": "BYTES", "data": ["b", "secret"]},
    ]
    body = json.dumps({"inputs": inputs})
    path = f"{url}/v2/models/classify/infer"
    assert urllib3.request("POST", path, body=body, headers=headers).status == 200


def test_one_request_followed_through_an_engine(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        with in_process(repository, tmp_path, log="json") as gateway:
            classify(gateway.url, **{**KEPT, "X-Request-Id": "my-id"})
    spans = collector.spans
    names = ("POST /v2/models/{model}/infer", "engine", "classify", "image_encoder", "text_encoder")
    gateway_, engine, task, encoder, texts = (of_name(spans, name) for name in names)
    assert (gateway_.trace, gateway_.parent) == (TRACE, CALLER)
    for span, parent in ((engine, gateway_), (task, engine), (encoder, task), (texts, task)):
        check_inside(span, parent)
    for span in spans:
        facts = [span.attributes[f"radapter.{name}"] for name in ("request_id", "task", "code")]
        assert facts == ["my-id", "classify", "ok"] and span.attributes["radapter.release"] == "2"
    [line] = [line for line in capsys.readouterr().err.splitlines() if "my-id" in line]
    logged = json.loads(line)
    took = sum(span.end - span.start for span in (encoder, texts)) / 1e6
    assert logged["encoder_ms"] == pytest.approx(took, abs=1e-3)
    assert 0 < logged["encoder_ms"] < logged["model_ms"]


# Triton


@needs_triton
@pytest.mark.triton
def test_one_request_followed_through_triton(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        # Triton's exporter resets its connection after 2 s, and sends no batch twice: on a machine
        # that is busy for so long its spans would be lost.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        with tritonserver(repository) as server, gateway(server) as url:
            # Without a traceparent the gateway begins a trace, and Triton alone sends nothing.
            classify(url)
            classify(server.http_url)
            # Each process sends its spans when it likes, and Triton each batch once, which a busy
            # machine loses; so another request follows where they do not come.
            names = ("POST /v2/models/{model}/infer", "InferRequest", "classify", "compute")
            traces = [f"{number:032x}" for number in (1, 2, 3)]
            for trace in traces:
                traceparent = f"00-{trace}-{CALLER}-01"
                classify(url, **{"traceparent": traceparent, "X-Request-Id": "my-id"})
                try:
                    spans = collector.wait_for(*names, "image_encoder", trace=trace)
                    break
                except AssertionError:
                    if trace == traces[-1]:
                        raise
    whole, triton, task, encoder = (of_name(spans, name) for name in (*names[:3], "image_encoder"))
    assert whole.parent == CALLER and whole.attributes["radapter.code"] == "ok"
    # The labels are known since the first request, so one encoder is asked.
    for span, parent in ((triton, whole), (task, triton), (encoder, task)):
        # Triton ends a span after the answer is sent, which its reader may have ended by then.
        assert span.parent == parent.id
        assert parent.start <= span.start <= min(span.end, parent.end)
    assert int(task.attributes["triton.model_version"]) == 2
    assert task.attributes["triton.request_id"] == "my-id"
    assert len([span for span in spans if span.name == "compute" and span.parent == task.id]) == 1
    assert len({span.trace for span in collector.spans} - set(traces)) == 1
    assert b"secret" not in b"".join(collector.bodies)


@needs_triton
@pytest.mark.triton
def test_triton_and_a_collector_that_does_not_answer(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], f"http://127.0.0.1:{silent.getsockname()[1]}")
        server = tritonserver(repository).start()
        try:
            for _ in range(20):
                classify(server.http_url, **KEPT)
            silent.settimeout(10)
            connection, _ = silent.accept()  # by which spans are on their way
            classify(server.http_url, **KEPT)
        finally:
            start = time.monotonic()
            server.stop()
        seconds = time.monotonic() - start
        connection.close()
    assert seconds < 12  # where it is killed after 15, and takes 6 without traces
