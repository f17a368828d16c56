"""What the gateway lets through and what it refuses, over real connections, in front of a stand-in
for Triton.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

import radapter_client
from radapter_client import Client
from radapter_serve.gateway import app
from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.errors import Refused, from_status
from radapter_serve.gateway.settings import Settings, Timeouts
from radapter_serve.release.release import TASKS
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import FakeUpstream, Served, config, serving
from tests.helpers.indexes import outdated_at

TEXT = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["abc"]}]}
INFER = "/v2/models/embed_text/infer"


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def ask(
    served: Served, path: str, body: Any = None, method: str = "", **headers: str
) -> tuple[int, Any, Any]:
    """Status, JSON and headers of an answer."""
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    method = method or ("GET" if body is None else "POST")
    answer = urllib3.request(
        method, served.url + path, body=sent, headers=given, retries=False, timeout=20
    )
    with contextlib.suppress(ValueError):
        return answer.status, json.loads(answer.data), answer.headers
    return answer.status, answer.data, answer.headers


def refusal(
    served: Served, path: str, body: Any = None, method: str = "", **headers: str
) -> tuple[int, str]:
    """Status and code of a refusal, which is one line."""
    status, answer, _ = ask(served, path, body, method, **headers)
    assert list(answer) == ["error"] and "\n" not in answer["error"]
    found = re.match(r"\[([a-z_]+)\] .", answer["error"])
    assert found, answer
    return status, found[1]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# What works


def test_the_client_works_unchanged(served: Served) -> None:
    with Client(served.url) as client:
        assert client.release().version == 1 and client.is_ready()
        assert client.embed_texts(["abc", "ü"]).tolist() == [[3, 97], [2, 195]]
        assert np.array_equal(client.embed_images([b"\x05xy"]), [[3, 5]])
    with Client(served.url, release=1) as client:
        assert client.is_ready()
    with Client(served.url, release=7) as client:
        assert not client.is_ready()


def test_answers_in_json_and_in_binary(served: Served) -> None:
    served.upstream.outputs = {
        "label": np.array([["ü".encode()]], object),
        "score": np.array([[0.1]], np.float32),
    }
    image = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["eA=="]}
    labels = {"name": "labels", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
    path = "/v2/models/classify/versions/1/infer"
    both = {"inputs": [image, labels], "id": "one"}
    status, found, headers = ask(served, path, both)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert found == {
        "id": "one",
        "model_name": "classify",
        "model_version": "1",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [1, 1], "data": ["ü"]},
            {
                "name": "score",
                "datatype": "FP32",
                "shape": [1, 1],
                "data": [float(np.float32(0.1))],
            },
        ],
    }
    outputs = [{"name": "label"}, {"name": "score", "parameters": {"binary_data": True}}]
    status, found, headers = ask(served, path, {**both, "outputs": outputs})
    length = int(headers["Inference-Header-Content-Length"])
    head = json.loads(found[:length])
    rest = found[length:]
    assert rest == np.float32(0.1).tobytes() and head["outputs"][0]["data"] == ["ü"]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 4}
    assert served.upstream.asked[-1].version == "1"


def test_a_mask_and_no_label_at_all(served: Served) -> None:
    mask = np.array([[0, 1, 2], [3, 4, 65535]], np.uint16).T  # in no order of C
    served.upstream.outputs = {"mask": mask, "label": np.empty(0, object)}
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["eA=="]}
    found = ask(served, "/v2/models/segment/infer", {"inputs": [image]})[1]
    assert found["outputs"] == [
        {"name": "mask", "datatype": "UINT16", "shape": [3, 2], "data": [0, 3, 1, 4, 2, 65535]},
        {"name": "label", "datatype": "BYTES", "shape": [0], "data": []},
    ]
    asked = {"inputs": [image], "parameters": {"binary_data_output": True}}
    _, found, headers = ask(served, "/v2/models/segment/infer", asked)
    length = int(headers["Inference-Header-Content-Length"])
    sizes = [one["parameters"]["binary_data_size"] for one in json.loads(found[:length])["outputs"]]
    assert sizes == [12, 0] and found[length:] == mask.tobytes()


def test_an_output_that_json_cannot_hold(served: Served) -> None:
    served.upstream.outputs = {"text_embeds": np.zeros((1, 2**20 + 1), np.float32)}
    assert refusal(served, INFER, TEXT) == (400, "invalid_argument")
    served.upstream.outputs = {"text_embeds": np.array([[b"\xff\xd8"]], object)}
    assert refusal(served, INFER, TEXT) == (400, "invalid_argument")


def test_what_describes_the_server(served: Served) -> None:
    assert ask(served, "/v2")[1]["extensions"] == ["binary_tensor_data"]
    assert ask(served, "/v2/models/retrieve")[1]["inputs"][0] == {
        "name": "text",
        "datatype": "BYTES",
        "shape": [-1],
    }
    assert ask(served, "/v2/models/embed_text")[1]["outputs"] == [
        {"name": "text_embeds", "datatype": "FP32", "shape": [-1, 4]}
    ]
    found = ask(served, "/v2/models/classify/versions/1/config")[1]
    assert found["input"][4] == {
        "name": "top_k",
        "data_type": "TYPE_INT32",
        "dims": [1],
        "optional": True,
    }
    assert (
        found["max_batch_size"] == 64
        and json.loads(found["parameters"]["release"]["string_value"])["version"] == 1
    )
    assert set(found) == {"name", "max_batch_size", "input", "output", "parameters"}


def test_a_configuration_is_read_again(served: Served) -> None:
    for version in (2, 3):
        served.upstream.configs["classify"] = config("classify", release(version))
        told = ask(served, "/v2/models/classify/config")[1]["parameters"]["release"]
        assert json.loads(told["string_value"])["version"] == version


def test_each_release_is_asked_by_its_own_configuration(served: Served) -> None:
    """Also after somebody has looked at another one's."""
    older = replace(config("embed_text"), max_batch_size=1)
    served.upstream.older["embed_text", "2"] = older
    two = {"inputs": [{**TEXT["inputs"][0], "shape": [2, 1], "data": ["a", "b"]}]}
    path = "/v2/models/embed_text/versions/2"
    assert ask(served, f"{path}/config")[1]["max_batch_size"] == 1
    assert ask(served, INFER, two)[0] == 200
    assert refusal(served, f"{path}/infer", two) == (400, "invalid_argument")
    assert ask(served, INFER, two)[0] == 200
    assert refusal(served, "/v2/models/embed_text/versions/3/infer", two) == (404, "unknown_model")
    assert refusal(served, "/v2/models/embed_text/versions/3") == (404, "unknown_model")


def test_configurations_that_nobody_asks_for_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked() -> int:
        gateway = Gateway(Settings(), FakeUpstream)
        async with gateway.opened():
            for name in TASKS:
                await gateway._model(name, "1")
            monkeypatch.setattr(app, "FRESH", 0.0)
            await gateway._model("classify")
        return len(gateway._models)

    assert asyncio.run(asked()) == 1


# What is refused


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v2/repository/index",
            "/v2/systemsharedmemory/status",
            "/v2/trace/setting",
            "/v2/logging",
        ),
        *("/v2/models/stats", "/v2/models/classify/stats", "/v2/models/classify/trace/setting"),
        *("/v2/repository/models/classify/unload", "/v2/cudasharedmemory/unregister"),
        *("/v2/models/classify/infer/x", "/v2/models/image_encoder/infer"),
        *("/v2/models/image_encoder", "/v2/models/%2e%2e%2fclassify/config", "/", "/v2/", "//v2"),
        *(
            f"/v2/models/classify/versions/{version}/config"
            for version in ("0", "x", "-1", "1e3", "9" * 30, "7")
        ),
    ],
)
def test_closed_paths(served: Served, path: str) -> None:
    for body in (None, TEXT):
        status, code = refusal(served, path, body)
        assert status in (404, 405) and code in ("not_found", "unknown_model")
    assert not served.upstream.asked


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content_Encoding": "gzip"}, 415, "unsupported_type"),
        ({"Content_Encoding": "identity, br"}, 415, "unsupported_type"),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "unsupported_type"),
        ({"Content_Type": "text/plain; charset=utf-8"}, 415, "unsupported_type"),
        ({"Inference_Header_Content_Length": "99999"}, 400, "invalid_argument"),
    ],
)
def test_headers_that_are_refused(
    served: Served, headers: dict[str, str], status: int, code: str
) -> None:
    assert refusal(served, INFER, TEXT, **headers) == (status, code)
    assert ask(served, INFER, TEXT, Content_Type="application/json; charset=utf-8")[0] == 200


def test_bodies_that_are_too_large() -> None:
    with serving(max_body=0.01) as served:
        assert refusal(served, INFER, b"x" * 11_000) == (413, "too_large")
        assert refusal(served, INFER, b"") == (400, "invalid_argument")
        chunks = [f"{0x1000:x}\r\n".encode() + b"x" * 0x1000 + b"\r\n"] * 3
        with talking(
            served,
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            % INFER.encode(),
        ) as it:
            it.sendall(b"".join(chunks))
            assert b"413" in heard(it)
        assert ask(served, INFER, TEXT)[0] == 200


def test_bodies_together_take_no_more_than_the_memory_set_apart() -> None:
    with serving(max_body=1, max_memory=1) as served:
        served.hold()
        text = {"inputs": [{**TEXT["inputs"][0], "data": ["x" * 600_000]}]}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, served, INFER, text)
            until(lambda: bool(served.upstream.asked))
            assert refusal(served, INFER, text) == (429, "overloaded")
            served.let_go()
            assert first.result()[0] == 200
        assert ask(served, INFER, text)[0] == 200


@contextlib.contextmanager
def talking(served: Served, data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.port), timeout=15) as it:
        it.sendall(data)
        yield it


def heard(it: socket.socket) -> bytes:
    """All of an answer in JSON."""
    answer = b""
    while b"}" not in answer and (part := it.recv(1000)):
        answer += part
    return answer


HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n" % INFER.encode()


def test_a_body_that_does_not_come() -> None:
    with serving(timeout=0.3) as served, talking(served, HEAD + b"\r\nabc") as it:
        assert b"408" in (answer := heard(it)) and b"[timed_out]" in answer
        with contextlib.suppress(ConnectionResetError):
            assert it.recv(100) == b""


def test_a_refused_body_is_not_waited_for(served: Served) -> None:
    with talking(served, HEAD + b"Content-Encoding: gzip\r\n\r\nabc") as it:
        assert b"415" in heard(it)
        with contextlib.suppress(ConnectionResetError):
            while it.recv(1000):
                pass


def big_answer(served: Served) -> bytes:
    """A request whose answer has 32 MiB."""
    served.upstream.outputs = {"text_embeds": np.zeros((1, 2**23), np.float32)}
    body = json.dumps({**TEXT, "parameters": {"binary_data_output": True}}).encode()
    return HEAD.replace(b"10", str(len(body)).encode()) + b"\r\n" + body


def test_an_answer_that_is_read_slowly() -> None:
    with (
        serving(timeouts=Timeouts(piece=0.5)) as served,
        talking(served, big_answer(served)) as it,
    ):
        got = 0
        end = time.monotonic() + 2.0  # four times the patience
        while part := it.recv(2**16 if time.monotonic() < end else 2**20):
            got += len(part)
            time.sleep(0.002 if time.monotonic() < end else 0)
            if got > 2**25:
                break
    assert got > 2**25


def test_an_answer_that_nobody_reads() -> None:
    with (
        serving(timeouts=Timeouts(piece=0.3)) as served,
        talking(served, big_answer(served)) as it,
    ):
        until(lambda: bool(served.upstream.asked))
        until(lambda: not served.connections.open)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while part := it.recv(2**20):
                got += len(part)
        assert 0 < got < 2**25


@pytest.mark.parametrize(("size", "status"), [(32_768, 200), (32_769, 431)])
def test_headers_are_counted_to_the_byte(served: Served, size: int, status: int) -> None:
    headers = b"host: localhost\r\nx: "
    named = len(b"/v2") + len(b"hostlocalhostx")
    with talking(
        served, b"GET /v2 HTTP/1.1\r\n" + headers + b"a" * (size - named) + b"\r\n\r\n"
    ) as it:
        assert heard(it).startswith(b"HTTP/1.1 %d" % status)


# Load, deadlines, callers that leave


def test_more_than_may_wait_is_refused_at_once() -> None:
    with serving(max_concurrent=2, max_queue=1) as served, ThreadPoolExecutor(3) as pool:
        served.hold()
        others = [pool.submit(ask, served, INFER, TEXT) for _ in range(3)]
        until(lambda: len(served.upstream.asked) == 2)
        time.sleep(0.2)
        status, answer, headers = ask(served, INFER, TEXT)
        assert (status, headers["Retry-After"]) == (429, "1") and answer["error"].startswith(
            "[overloaded] 2 requests"
        )
        assert len(served.upstream.asked) == 2
        served.let_go()
        assert [other.result()[0] for other in others] == [200] * 3
        assert ask(served, INFER, TEXT)[0] == 200


def test_a_caller_that_leaves_cancels_its_request() -> None:
    with serving(max_concurrent=1) as served:
        served.hold()
        body = json.dumps(TEXT).encode()
        with talking(served, HEAD.replace(b"10", str(len(body)).encode()) + b"\r\n" + body):
            until(lambda: bool(served.upstream.asked))
        until(lambda: served.upstream.cancelled == 1)
        served.let_go()
        assert ask(served, INFER, TEXT)[0] == 200  # its place is free again


def test_deadlines(served: Served) -> None:
    ask(served, INFER, TEXT)
    assert 59 < served.upstream.timeouts[-1] <= 60
    ask(served, INFER, {**TEXT, "parameters": {"timeout": 2_000_000}})
    assert 1 < served.upstream.timeouts[-1] <= 2
    ask(served, INFER, {**TEXT, "parameters": {"timeout": 10**15}})
    assert 59 < served.upstream.timeouts[-1] <= 60
    served.hold()  # a Triton that does not keep to its deadline
    assert refusal(served, INFER, {**TEXT, "parameters": {"timeout": 1}}) == (504, "timed_out")
    until(lambda: served.upstream.cancelled == 1)


# Failures behind the gateway


FAILED = "Failed, message: "


@pytest.mark.parametrize(
    ("status", "text", "http_status", "code"),
    [
        ("INVALID_ARGUMENT", "[invalid_image] 5 bytes are not an image", 400, "invalid_image"),
        ("INTERNAL", "x, message: [encoder_failed] it did /srv/m.py", 500, "encoder_failed"),
        ("INTERNAL", "Stub died at /tmp/x\n\nAt:\n /a.py(3)", 500, "internal_error"),
        ("INVALID_ARGUMENT", "[request id: <id_unknown>] bad /x", 400, "invalid_argument"),
        ("NOT_FOUND", "unknown model: 'x' has no available versions", 503, "restarting"),
        ("INTERNAL", f"{FAILED}Model 'image_encoder' is not ready.", 503, "restarting"),
        ("NOT_FOUND", "model 'x' version 7 is not found", 404, "unknown_model"),
        ("UNAVAILABLE", "ipv4:127.0.0.1:8001: refused", 503, "server_unavailable"),
        ("UNAVAILABLE", "[server_stopping] it stops", 503, "server_stopping"),
        ("UNAVAILABLE", "[overloaded] the queue is full", 429, "overloaded"),
        ("UNAVAILABLE", "Exceeds maximum queue size", 429, "overloaded"),
        ("INTERNAL", "Failed to increase the shared memory pool size", 429, "overloaded"),
        ("INTERNAL", f"{FAILED}Stub process 'x_0_0' is not healthy.", 503, "restarting"),
        ("UNAVAILABLE", f"{FAILED}[restarting] its encoder", 503, "restarting"),
        ("INTERNAL", f"{FAILED}[timed_out] this took too long", 504, "timed_out"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", 504, "timed_out"),
        ("UNKNOWN", "x", 500, "internal_error"),
    ],
)
def test_errors_of_triton(status: str, text: str, http_status: int, code: str) -> None:
    error = from_status(status, text)
    assert (error.status, error.code) == (http_status, code)
    assert "\n" not in str(error) and "/" not in str(error)


def test_a_fault_of_the_gateway_is_one_line_without_a_trace(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.upstream.error = RuntimeError("a bug at /home/x")
    status, answer, _ = ask(served, INFER, TEXT)
    assert (status, answer) == (
        500,
        {"error": "[internal_error] the gateway failed on this request; its log says why"},
    )
    assert "a bug at /home/x" in caplog.text


def test_the_page_of_another_site_is_not_cut_off_while_it_sends(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    for _ in range(20):
        connection.request("POST", INFER, bytes(300_000), {"Origin": "https://elsewhere"})
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.getheader("Connection")) == (403, None)
    connection.close()


# Health and metrics


def test_ready_means_that_every_task_answers(served: Served) -> None:
    assert ask(served, "/health/live")[0] == ask(served, "/v2/health/live")[0] == 200
    assert ask(served, "/v2/health/ready")[0] == ask(served, "/health/ready")[0] == 200
    assert sorted(one.model for one in served.upstream.asked) == sorted(TASKS)  # once for both


def test_a_server_whose_tasks_fail_lives_and_is_not_ready(served: Served) -> None:
    served.upstream.error = Refused(500, "internal_error", "")
    assert refusal(served, "/health/ready") == (503, "server_unavailable")
    assert ask(served, "/health/live")[0] == 200


def test_a_task_that_answers_callers_is_not_asked_for_its_health(served: Served) -> None:
    ask(served, INFER, TEXT)
    ask(served, "/health/ready")
    assert [one.model for one in served.upstream.asked].count("embed_text") == 1


def test_metrics_have_no_word_of_a_caller(served: Served) -> None:
    ask(served, INFER, TEXT)
    refusal(served, INFER, {"inputs": []})
    refusal(served, "/v2/models/mallory/infer", TEXT)
    served.upstream.error = Refused(400, "mallory", "no")
    refusal(served, INFER, TEXT)
    text = ask(served, "/metrics")[1].decode()
    for line in (
        'radapter_gateway_requests_total{code="ok",task="embed_text"} 1.0',
        'radapter_gateway_requests_total{code="invalid_argument",task="embed_text"} 1.0',
        'radapter_gateway_requests_total{code="unknown_model",task="none"} 1.0',
        'radapter_gateway_requests_total{code="other",task="embed_text"} 1.0',
        'radapter_gateway_request_seconds_count{task="embed_text"} 3.0',
        "radapter_gateway_running 0.0",
    ):
        assert line in text
    assert "mallory" not in text


def test_metrics_of_indexes_do_not_wait_for_a_storage() -> None:
    name = 'fötos "写真" \\ 👩‍🔬'
    with serving(timeouts=Timeouts(index=0.05)) as served:
        assert "radapter_index" not in ask(served, "/metrics")[1].decode()
        served.upstream.outdated = {name: True, "new": False}
        assert outdated_at(f"{served.url}/metrics") == {name: 1, "new": 0}
        served.upstream.outdated = {}
        served.hold()
        known = outdated_at(f"{served.url}/metrics")
        served.let_go()
        assert known == {name: 1, "new": 0}  # what was known last
        served.upstream.outdated = None
        assert outdated_at(f"{served.url}/metrics") == known
        served.upstream.outdated = {}
        assert outdated_at(f"{served.url}/metrics") == {}


def test_the_names_of_the_indexes_are_listed_where_their_folder_is_known(tmp_path: Path) -> None:
    path = "/v2/models/retrieve/indexes"
    with serving(indexes=tmp_path / "indexes") as served, Client(served.url) as client:
        assert ask(served, path)[:2] == (200, {"indexes": []})
        for name in ("photos", "Büro", ".new", "no index"):
            (tmp_path / "indexes" / name).mkdir(parents=True)
        for name in ("photos", "Büro", ".new"):
            (tmp_path / "indexes" / name / "index.json").touch()
        assert client.indexes() == ["Büro", "photos"]
        assert served.upstream.asked == []  # it is no inference
        assert refusal(served, path, TEXT) == (405, "not_found")
        assert refusal(served, "/v2/models/classify/indexes") == (404, "not_found")
    with serving() as served, Client(served.url) as client:
        assert refusal(served, path) == (404, "not_found")
        with pytest.raises(radapter_client.InvalidRequest, match="radapter-gateway --indexes DIR"):
            client.indexes()
    keys = tmp_path / "keys"
    keys.write_text(f"ann: {digest('first')}\n")
    with serving(api_keys=keys, indexes=tmp_path / "indexes") as served:
        assert refusal(served, path) == (401, "unauthorized")


# Keys


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_let_in_and_are_read_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# callers\nann: {digest('first')}\n\n")
    with serving(api_keys=keys) as served:
        for path in ("/v2", "/metrics", "/v2/models/classify/config", "/v2/models/image_encoder"):
            status, answer, headers = ask(served, path)
            assert (status, headers["WWW-Authenticate"]) == (
                401,
                "Bearer",
            ) and "[unauthorized]" in answer["error"]
        assert refusal(served, INFER, TEXT) == (401, "unauthorized")
        assert ask(served, "/health/live")[0] == ask(served, "/health/ready")[0] == 200
        for wrong in (
            "first",
            "Basic first",
            "Bearer",
            "Bearer second",
            f"Bearer {digest('first')}",
            "Bearer first\xff",
        ):
            assert refusal(served, "/v2", Authorization=wrong) == (401, "unauthorized")
        assert ask(served, "/v2", Authorization="Bearer first")[0] == 200
        assert ask(served, "/v2", authorization="bearer first")[0] == 200
        with Client(served.url, api_key="first") as client:
            assert client.embed_texts(["abc"]).tolist() == [[3, 97]]
        keys.write_text(f"bob: {digest('second')}\n")
        assert ask(served, "/v2", Authorization="Bearer second")[0] == 200
        with (
            Client(served.url, api_key="first") as client,
            pytest.raises(radapter_client.Unauthorized) as caught,
        ):
            client.embed_texts(["abc"])
        assert caught.value.code == "unauthorized"
        keys.write_text("bob second\n")
        assert refusal(served, "/v2", Authorization="Bearer second") == (401, "unauthorized")
        keys.unlink()
        assert refusal(served, "/v2", Authorization="Bearer second") == (401, "unauthorized")
