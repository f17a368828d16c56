"""Spans of Triton: inside those of the gateway, and of nobody else's making."""

from __future__ import annotations

import base64
import json
import socket
import time
from pathlib import Path

import pytest
import urllib3

from radapter_serve.process import OTLP_ENDPOINTS
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.collector import Span, collecting, of_name
from tests.helpers.gateway import gateway
from tests.helpers.needs_triton import needs_triton
from tests.helpers.small_release import png

pytestmark = [pytest.mark.triton, needs_triton]
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


def ask(url: str, **headers: str) -> urllib3.BaseHTTPResponse:
    image = base64.b64encode(png(3)).decode()
    inputs = [
        {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [image]},
        {"name": "labels", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "secret"]},
    ]
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"inputs": inputs})
    return urllib3.request("POST", f"{url}/v2/models/classify/infer", body=body, headers=given)


def test_one_request_followed_through_triton(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        monkeypatch.setenv(OTLP_ENDPOINTS[0], collector.url)
        with (
            TritonServer(ServerConfig(repository, Endpoints.on_free_ports())) as server,
            gateway(server) as url,
        ):
            # Without a traceparent the gateway begins a trace, and Triton alone sends nothing.
            assert ask(url).status == 200
            assert ask(server.http_url).status == 200
            known = {"traceparent": f"00-{TRACE}-{CALLER}-01", "X_Request_Id": "my-id"}
            assert ask(url, **known).status == 200
            # Each process sends its spans when it likes.
            names = ("POST /v2/models/{model}/infer", "InferRequest", "classify", "compute")
            spans = collector.wait_for(*names, "image_encoder", trace=TRACE)

    def check_inside(name: str, parent: Span) -> Span:
        span = of_name(spans, name)
        # Triton ends a span after the answer is sent, which its reader may have ended by then.
        assert span.parent == parent.id
        assert parent.start <= span.start <= min(span.end, parent.end)
        return span

    whole = of_name(spans, "POST /v2/models/{model}/infer")
    assert whole.parent == CALLER and whole.attributes["radapter.code"] == "ok"
    triton = check_inside("InferRequest", whole)
    task = check_inside("classify", triton)
    assert int(task.attributes["triton.model_version"]) == 2
    assert task.attributes["triton.request_id"] == "my-id"
    compute = [one for one in spans if one.name == "compute" and one.parent == task.id]
    assert len(compute) == 1
    check_inside("image_encoder", task)  # the labels are known since the first request
    assert len({one.trace for one in collector.spans}) == 2
    assert b"secret" not in b"".join(collector.bodies)


def test_triton_and_a_collector_that_does_not_answer(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv(OTLP_ENDPOINTS[0], f"http://127.0.0.1:{port}")
        server = TritonServer(ServerConfig(repository, Endpoints.on_free_ports())).start()
        try:
            for _ in range(20):
                known = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
                assert ask(server.http_url, **known).status == 200
            silent.settimeout(10)
            connection, _ = silent.accept()  # by which spans are on their way
            assert ask(server.http_url, **known).status == 200
        finally:
            start = time.monotonic()
            server.stop()
        seconds = time.monotonic() - start
        connection.close()
    assert seconds < 12  # where it is killed after 15, and takes 6 without traces
