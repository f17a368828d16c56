"""Requests that the gateway passes on or refuses, over real connections, in front of a stand-in for
Triton.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import radapter_client
from radapter_client import Client
from radapter_serve.gateway.access import new_key
from radapter_serve.gateway.app import FRESH, Health
from radapter_serve.gateway.middleware import BrowserRule
from radapter_serve.gateway.settings import Timeouts
from radapter_serve.gateway.upstream import Refused
from radapter_serve.release.release import TASKS
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import INFER, TEXT, FakeUpstream, Served, config, serving, until

BODY = json.dumps(TEXT).encode()
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % INFER.encode()
EMBED = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
ALIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
IMAGE = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["eA=="]}
LOCAL = "localhost:8080"


def heard(it: socket.socket) -> bytes:
    """One answer as a whole, and nothing beyond it; nothing where the connection has ended."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        part = it.recv(1)
        if not part:
            return head
        head += part
    size = int(head.lower().partition(b"\r\ncontent-length:")[2].split()[0])
    end = len(head) + size
    while len(head) < end and (part := it.recv(end - len(head))):
        head += part
    return head


# Answers


def test_the_client_works_unchanged(served: Served) -> None:
    with Client(served.url) as client:
        assert client.release().version == 1 and client.is_ready()
        assert client.embed_texts(["abc", "ü"]).tolist() == [[3, 97], [2, 195]]
        assert client.embed_images([b"\x05xy"]).tolist() == [[3, 5]]
    for number, is_ready in ((1, True), (7, False)):
        with Client(served.url, release=number) as client:
            assert client.is_ready() == is_ready


def test_answers_in_json_and_in_binary(served: Served) -> None:
    mask = np.array([[0, 1, 2], [3, 4, 65535]], np.uint16).T  # in no order of C
    labels = np.array(["ü".encode()], object)
    served.upstream.outputs = {"mask": mask, "label": labels, "score": np.empty(0, np.float32)}
    path = "/v2/models/segment/versions/1/infer"
    body: dict[str, Any] = {"inputs": [IMAGE], "id": "one"}
    status, answer, headers = served.ask(path, body)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert answer == {
        "id": "one",
        "model_name": "segment",
        "model_version": "1",
        "outputs": [
            {"name": "mask", "datatype": "UINT16", "shape": [3, 2], "data": [0, 3, 1, 4, 2, 65535]},
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["ü"]},
            {"name": "score", "datatype": "FP32", "shape": [0], "data": []},
        ],
    }
    assert served.upstream.asked[-1].version == "1"
    outputs = [{"name": "label"}, {"name": "mask", "parameters": {"binary_data": True}}]
    for wish, sizes in (
        ({"outputs": outputs}, [12, None, None]),
        ({"parameters": {"binary_data_output": True}}, [12, 6, 0]),
    ):
        _, content, headers = served.ask(path, body | wish)
        length = int(headers["Inference-Header-Content-Length"])
        descriptions = json.loads(content[:length])["outputs"]
        assert [
            description.get("parameters", {}).get("binary_data_size")
            for description in descriptions
        ] == sizes
        assert content[length:].startswith(mask.tobytes())


def test_metadata(served: Served) -> None:
    assert served.ask("/v2")[1]["extensions"] == ["binary_tensor_data"]
    text = {"name": "text", "datatype": "BYTES", "shape": [-1]}
    assert served.ask("/v2/models/retrieve")[1]["inputs"][0] == text
    kinds = (
        *(("text", "BYTES", 1), ("adapter", "BYTES", 1), ("alpha", "FP32", 1)),
        *(("text_embeds", "FP32", 4), ("receipt", "BYTES", 1)),
    )
    tensors = [
        {"name": name, "datatype": datatype, "shape": [-1, width]}
        for name, datatype, width in kinds
    ]
    assert served.ask("/v2/models/embed_text")[1] == {
        **{"name": "embed_text", "versions": ["1"], "platform": "python"},
        **{"inputs": tensors[:3], "outputs": tensors[3:]},
    }
    model_config = served.ask("/v2/models/classify/versions/1/config")[1]
    top_k = {"name": "top_k", "data_type": "TYPE_INT32", "dims": [1], "optional": True}
    assert model_config["input"][4] == top_k and model_config["max_batch_size"] == 64
    for version in (1, 2):  # the configuration is never one that was remembered
        served.upstream.configs["classify"] = config("classify", release(version))
        told = served.ask("/v2/models/classify/config")[1]["parameters"]["release"]
        assert json.loads(told["string_value"])["version"] == version


def test_each_release_is_asked_by_its_own_configuration(served: Served) -> None:
    """This holds even after somebody has looked at another one's."""
    served.upstream.older["embed_text", "2"] = replace(config("embed_text"), max_batch_size=1)
    two = {"inputs": [{**TEXT["inputs"][0], "shape": [2, 1], "data": ["a", "b"]}]}
    assert served.ask(INFER, two)[0] == 200
    assert served.refusal("/v2/models/embed_text/versions/2/infer", two)[0] == 400
    assert served.ask(INFER, two)[0] == 200


@pytest.mark.parametrize(
    ("fact", "shown"),
    [
        ("local-dir:/srv/my secret/base", "local-dir:base"),
        ("local-dir:runs/secret/base", "local-dir:base"),
        ("imagefolder:/data/secret/photos", "imagefolder:photos"),
        ("/srv/secret/base/", "base"),
        ("~/secret/base", "base"),
        ("ranges found by /srv/secret/base", "ranges found by ..."),
        *((same, same) for same in ("hf-hub:organisation/name", "ViT-B-32", "sha256:00")),
    ],
)
def test_no_path_of_the_server_is_told(fact: str, shown: str) -> None:
    facts = release(1) | {"architecture": fact, "made": [{"by": fact}], "templates": ["a /{}/"]}
    public = facts | {"architecture": shown, "made": [{"by": shown}]}
    assert config("classify", facts).releases["release"] == public


def test_indexes_are_listed_where_their_folder_is_known(served: Served, tmp_path: Path) -> None:
    for name in ("photos", "Büro", ".new", "no index"):
        (tmp_path / name).mkdir()
        if name != "no index":
            (tmp_path / name / "index.json").touch()
    with serving(indexes=tmp_path) as known, Client(known.url) as client:
        assert client.indexes() == ["Büro", "photos"] and not known.upstream.asked
    with (
        Client(served.url) as client,
        pytest.raises(radapter_client.InvalidRequest, match="radapter-gateway --indexes DIR"),
    ):
        client.indexes()


# Refusals


def test_closed_paths(served: Served) -> None:
    for path in (
        *("/v2/repository/index", "//v2", "/", "/v2/models/stats"),
        *("/v2/models/classify/infer/x", "/v2/models/image_encoder/infer"),
        *("/v2/models/image_encoder", "/v2/models/%2e%2e%2fclassify/config"),
        *(
            f"/v2/models/classify/versions/{version}/config"
            for version in ("0", "x", "9" * 30, "7")
        ),
    ):
        for body in (None, TEXT):
            status, code = served.refusal(path, body)
            assert status in (404, 405) and code in ("not_found", "unknown_model"), path
    why = served.ask("/v2/models/image_encoder")[1]["error"]
    assert "no model 'image_encoder' here; there are embed_image" in why
    assert not served.upstream.asked


def test_headers_and_bodies_that_are_refused() -> None:
    with serving(max_body=0.01) as served:
        for headers, status, code in (
            ({"Content_Encoding": "gzip"}, 415, "unsupported_type"),
            ({"Content_Encoding": "identity, br"}, 415, "unsupported_type"),
            ({"Content_Type": "text/plain; charset=utf-8"}, 415, "unsupported_type"),
            ({"Inference_Header_Content_Length": "99999"}, 400, "invalid_argument"),
        ):
            assert served.refusal(INFER, TEXT, **headers) == (status, code)
        assert served.ask(INFER, TEXT, Content_Type="application/json; charset=utf-8")[0] == 200
        head = b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nx: %s\r\n\r\n"
        for size, begin in ((32_768, b"HTTP/1.1 200"), (32_769, b"HTTP/1.1 431")):
            with served.connection(head % (b"a" * (size - len(head) + 2))) as it:
                assert heard(it).startswith(begin)
        # JSON may have a quarter of it, also in front of tensors in binary.
        for size, json_size in ((10_486, 9), (2_622, None), (5_000, 2_622)):
            length = {"Inference_Header_Content_Length": str(json_size)} if json_size else {}
            assert served.refusal(INFER, b"x" * size, **length) == (413, "too_large")
        with served.connection(HEAD + b"Content-Length: 2622\r\n\r\n") as it:
            assert b"413" in heard(it)
        why = served.ask("/v1/embeddings", b"x" * 2_622)[1]["error"]["message"]
        assert "MiB, the most that is taken of JSON; send tensors in binary" in why
        assert served.refusal(INFER, b"") == (400, "invalid_argument")
        chunk = b"1000\r\n" + bytes(0x1000) + b"\r\n"
        with served.connection(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3) as it:
            assert b"413" in heard(it)
    with (
        serving(timeout=0.5, timeouts=Timeouts(idle=0.5)) as served,
        served.connection(HEAD + b"Content-Length: 10\r\n\r\nabc") as it,  # and no more comes
    ):
        assert b"408" in (answer := heard(it)) and b"[timed_out]" in answer
        with contextlib.suppress(ConnectionResetError):
            assert it.recv(100) == b""


def test_failures_tell_nothing_of_the_server(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for values in (np.zeros((1, 2**20 + 1), np.float32), np.array([[b"\xff\xd8"]], object)):
        served.upstream.outputs = {"text_embeds": values}  # which JSON can't hold
        assert served.refusal(INFER, TEXT) == (400, "invalid_argument")
    served.upstream.error = RuntimeError("a bug at /home/x")
    status, answer, _ = served.ask(INFER, TEXT)
    assert (status, "[internal_error]" in answer["error"]) == (500, True)
    assert "a bug" not in answer["error"] and "a bug at /home/x" in caplog.text


# Load, deadlines, callers that leave


def test_more_than_may_wait_is_refused_at_once() -> None:
    with (
        serving(max_concurrent=2, max_queue=1) as served,
        ThreadPoolExecutor(3) as pool,
    ):
        served.hold()
        others = [pool.submit(served.ask, INFER, TEXT) for _ in range(3)]
        until(lambda: "radapter_gateway_waiting 1.0" in served.metrics())
        status, answer, headers = served.ask(INFER, TEXT)
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"].startswith("[overloaded] 2 requests")
        assert len(served.upstream.asked) == 2
        served.let_go()
        assert [other.result()[0] for other in others] == [200] * 3
        assert served.ask(INFER, TEXT)[0] == 200


def test_a_caller_that_leaves_cancels_its_request() -> None:
    with serving(max_concurrent=1) as served:
        served.hold()
        with served.connection(EMBED):
            until(lambda: served.upstream.asked)
        until(lambda: served.upstream.cancelled == 1)
        served.let_go()
        assert served.ask(INFER, TEXT)[0] == 200  # its place is free again
        assert 'requests_total{code="caller_gone",task="embed_text"} 1.0' in served.metrics()


def test_deadlines(served: Served) -> None:
    for microseconds, most in ((None, 60), (2_000_000, 2), (10**15, 60)):
        served.ask(INFER, {**TEXT, "parameters": {"timeout": microseconds}})
        assert most - 1 < served.upstream.timeouts[-1] <= most
    served.hold()  # a Triton that does not keep to its deadline
    timeout = {**TEXT, "parameters": {"timeout": 1}}
    assert served.refusal(INFER, timeout) == (504, "timed_out")
    until(lambda: served.upstream.cancelled == 1)


def test_an_answer_that_is_read_slowly() -> None:
    """16 MiB of which 64 KiB are read at a time, for longer than one piece may take."""
    with serving(timeouts=Timeouts(piece=1)) as served:
        served.upstream.outputs = {"text_embeds": np.zeros((1, 2**22), np.float32)}
        body = json.dumps({**TEXT, "parameters": {"binary_data_output": True}}).encode()
        size = 0
        with served.connection(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)) as it:
            while size <= 2**24 and (part := it.recv(2**16)):
                size += len(part)
                time.sleep(0.006)
        assert size > 2**24


# Pages of other sites


HOST = ("Host", LOCAL)
LET_IN: list[list[tuple[str, str]]] = [
    *([("Host", host)] for host in (LOCAL, "LOCALHOST", "127.9.9.9", "[::1]:8080", "box")),
    [HOST, ("Origin", f"http://{LOCAL}")],
    *([HOST, ("Sec-Fetch-Site", site)] for site in ("none", "same-origin")),
]
KEPT_OUT: list[list[tuple[str, str]]] = [
    *([("Host", f"{name}.example")] for name in ("evil", "localhost.evil", "127.0.0.1.evil")),
    *([("Host", host)] for host in ("10.0.0.1", "[", "")),
    *([("Host", "localhost")] * count for count in (0, 2)),
    *([HOST, ("Origin", f"http://{name}")] for name in ("evil.example", "localhost:3000", "[")),
    [HOST, ("Origin", "null")],
    *([HOST, ("Sec-Fetch-Site", f"{kind}-site")] for kind in ("same", "cross")),
]


@pytest.mark.parametrize("headers", [*LET_IN, *KEPT_OUT])
def test_what_a_browser_may_ask_on_this_machine(headers: list[tuple[str, str]]) -> None:
    async def passed(scope: Any, receive: Any, send: Any) -> None: ...

    rule: Any = BrowserRule(passed, "box")
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers]
    asking = rule({"type": "http", "headers": pairs}, None, None)
    if headers in LET_IN:
        asyncio.run(asking)
    else:
        with pytest.raises(Refused) as refused:
            asyncio.run(asking)
        assert refused.value.status == 403


def test_the_rule_for_browsers_holds_for_all_paths_and_not_for_keys(
    served: Served, tmp_path: Path
) -> None:
    foreign = {"Host": "models.example.org", "Origin": "http://other.example"}
    for path in ("/v2", "/v1/models", "/metrics", "/health/live"):
        assert [served.ask(path, **{name: foreign[name]})[0] for name in foreign] == [403, 403]
    key = new_key(tmp_path / "keys", "ann")
    with serving(api_keys=tmp_path / "keys") as with_keys:
        assert with_keys.ask("/v2", Authorization=f"Bearer {key}", **foreign)[0] == 200
    with serving(no_api_keys=True) as everybody:
        assert everybody.ask("/v2", Host="models.example.org")[0] == 200
        assert everybody.ask(INFER, TEXT, Origin="http://other.example")[0] == 403


# Health and metrics


def test_answers_and_failures_count_for_some_seconds() -> None:
    async def main() -> None:
        upstream = FakeUpstream()
        clock = FakeClock()
        health = Health(upstream, now=clock.monotonic)
        assert await health.trouble() is None
        assert sorted(inference.model for inference in upstream.asked) == sorted(TASKS)
        upstream.error = Refused(500, "internal_error", "")
        clock.now += FRESH - 0.01
        health.answered("classify")
        assert await health.trouble() is None
        assert upstream.timeouts == [10] * len(TASKS)
        clock.now += 0.01
        assert "does not answer" in (await health.trouble() or "")
        # All but the task that has answered a caller since.
        asked = upstream.asked[len(TASKS) :]
        assert sorted(inference.model for inference in asked) == sorted(set(TASKS) - {"classify"})
        upstream.error = Refused(400, "no_patch_encoder", "")
        clock.now += FRESH - 0.01
        assert "does not answer" in (await health.trouble() or "")
        clock.now += 0.01
        assert await health.trouble() is None  # a refusal is an answer

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_log_on_a_full_disk_costs_nobody_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(log="json") as served, Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        statuses = [served.ask(INFER, TEXT)[0] for _ in range(200)]
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert set(statuses) == {200}


def test_metrics_have_no_word_of_a_caller(served: Served) -> None:
    served.ask(INFER, TEXT)
    served.refusal(INFER, {"inputs": []})
    served.refusal("/v2/models/mallory/infer", TEXT)
    served.upstream.error = Refused(400, "mallory", "no")
    served.refusal(INFER, TEXT)
    text = served.metrics()
    for line in (
        'radapter_gateway_requests_total{code="ok",task="embed_text"} 1.0',
        'radapter_gateway_requests_total{code="invalid_argument",task="embed_text"} 1.0',
        'radapter_gateway_requests_total{code="unknown_model",task="none"} 1.0',
        'radapter_gateway_requests_total{code="other",task="embed_text"} 1.0',
        'radapter_gateway_request_seconds_count{task="embed_text"} 3.0',
        "# HELP radapter_gateway_running Requests that Triton or the engine works on",
        "radapter_gateway_running 0.0",
        'radapter_gateway_release_info{precision="fp32",release="1",runtime="onnxruntime"} 1.0',
    ):
        assert line in text
    assert "mallory" not in text
