"""The client on the wire, with servers that a test makes up: errors, time-outs, tries and keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
import trustme
from tritonclient.grpc import service_pb2

import radapter_client
from radapter_client import AsyncClient, Client, Timeout, _sending
from radapter_client import grpc as triton
from radapter_serve.cli import query
from tests.helpers.stand_ins import grpc_server, http_server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the wait between two tries."""
    monkeypatch.setattr(_sending, "FIRST_WAIT", 0.01)


def attempt(url: str, ask: Callable[[Client], Any], **options: Any) -> Any:
    """The answer of a call, or the error."""
    try:
        with Client(url, **options) as client:
            return ask(client)
    except radapter_client.RAdapterClientError as error:
        return error


def embed(client: Any) -> Any:
    return client.embed_texts(["x"])


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A socket that listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def url_of(listener: socket.socket, scheme: str = "http", host: str = "127.0.0.1") -> str:
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


@contextlib.contextmanager
def serving(serve: Callable[[socket.socket], None], scheme: str = "http") -> Iterator[str]:
    """A server on this machine that does so with each connection, one after the other; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the end
                while True:
                    with listener.accept()[0] as caller, contextlib.suppress(OSError):
                        serve(caller)

        thread = threading.Thread(target=accept)
        thread.start()
        yield url_of(listener, scheme, "localhost")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


BAD = ("INVALID_ARGUMENT", 400)
ABSENT = ("NOT_FOUND", 404)
FAULT = ("INTERNAL", 500)
AWAY = ("UNAVAILABLE", 503)
UNKNOWN = "Request for unknown model: 'segment' "


@pytest.mark.parametrize(
    ("status", "text", "error", "code", "message"),
    [
        (FAULT, "[invalid_image] row 3: none", "InvalidImage", "invalid_image", "^row 3: none$"),
        (FAULT, "[encoder_failed] it did", "ServerError", "encoder_failed", "it did"),
        (BAD, "[a_new_code] new", "InvalidRequest", "a_new_code", "new"),
        (BAD, "[request id: <id_unknown>] batch-size", "InvalidRequest", None, "^batch-size"),
        (ABSENT, "model 'x' has no version 7", "ModelNotFound", None, "version 7.*query release"),
        (ABSENT, UNKNOWN + "is not found", "ModelNotFound", None, "'segment': .*radapter-export"),
        (
            *(ABSENT, UNKNOWN + "has no available versions", "ServerUnavailable", "restarting"),
            "the server is starting or stopping",
        ),
        (AWAY, "Exceeds maximum queue size", "ServerUnavailable", "overloaded", "^Exceeds"),
        (AWAY, "[restarting] soon", "ServerUnavailable", "restarting", "^soon$"),
        (("DEADLINE_EXCEEDED", 504), "late", "Timeout", None, "late|within"),
        (FAULT, "failed: X: y\n\nAt:\n  /a.py(3): b", "ServerError", None, "failed: X: y$"),
        (FAULT, "", "ServerError", None, "answered"),
    ],
)
def test_errors_of_the_server(
    status: tuple[str, int], text: str, error: str, code: str | None, message: str
):
    body = json.dumps({"error": text}).encode()
    with (
        grpc_server((grpc.StatusCode[status[0]], text)) as (grpc_url, _),
        http_server(status[1], body) as (http_url, _),
    ):
        for url in (grpc_url, http_url):
            raised = attempt(url, embed, timeout=20, retries=0)
            assert (type(raised).__name__, raised.code) == (error, code)
            assert re.search(message, str(raised))


ANSWER = {"model_name": "m", "model_version": "3"}


def binary(**outputs: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """A reply in binary, written here by the letter of Triton's extension of the protocol."""
    heads = []
    parts = []
    for name, array in outputs.items():
        if array.dtype == object:
            data = b"".join(struct.pack("<I", len(text)) + text for text in array.ravel())
        else:
            data = array.tobytes()
        datatype = {"O": "BYTES", "f": "FP32", "u": "UINT16"}[array.dtype.kind]
        size = {"binary_data_size": len(data)}
        heads.append(
            {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": size}
        )
        parts.append(data)
    head = json.dumps({**ANSWER, "outputs": heads}).encode()
    return b"".join([head, *parts]), {"Inference-Header-Content-Length": str(len(head))}


def test_inference_over_http():
    """Triton answers in binary; a proxy or another server may answer in JSON."""
    body, headers = binary(
        label=np.array([[b"a\0", "ü".encode()]], object), score=np.array([[0.75, 0.25]], np.float32)
    )
    outputs = [
        {"name": "label", "datatype": "BYTES", "shape": [1, 2], "data": ["a\0", "ü"]},
        {"name": "score", "datatype": "FP32", "shape": [1, 2], "data": [0.75, 0.25]},
    ]
    in_json = json.dumps({**ANSWER, "outputs": outputs}).encode()
    for answer in ((body, headers), (in_json, {})):
        with http_server(200, *answer) as (url, seen):
            classified = attempt(
                url, lambda c: c.classify(b"image", ["a\0", "ü"], alpha=0.5), release=3
            )
        assert (classified.labels, classified.scores, classified.release) == (
            ["a\0", "ü"],
            [0.75, 0.25],
            3,
        )
    [(method, path, sent, body, _)] = seen
    assert (method, path) == ("POST", "/v2/models/classify/versions/3/infer")
    length = int(sent["Inference-Header-Content-Length"])
    head = json.loads(body[:length])
    rest = body[length:]
    assert head["parameters"] == {"binary_data_output": True}
    values: dict[str, Any] = {}
    for tensor in head["inputs"]:
        size = tensor["parameters"]["binary_data_size"]
        values[tensor["name"]] = (tensor["datatype"], tensor["shape"], rest[:size])
        rest = rest[size:]
    assert rest == b""
    assert values == {
        "labels": ("BYTES", [1, 2], b"\2\0\0\0a\0\2\0\0\0\xc3\xbc"),
        "alpha": ("FP32", [1, 1], struct.pack("<f", 0.5)),
        "image": ("BYTES", [1, 1], b"\5\0\0\0image"),
    }


GOOD, LENGTH = binary(text_embeds=np.ones((1, 4), np.float32))


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"<html>hello</html>", {}),
        (b"null", {}),
        (GOOD, {}),
        (GOOD[:-1], LENGTH),
        (GOOD, {"Inference-Header-Content-Length": "9" * 9}),
        (GOOD.replace(b"[1, 4]", b"[1, 9]"), LENGTH),
        (GOOD.replace(b"FP32", b"CATS"), LENGTH),
        (GOOD.replace(b'"FP32"', b'"BYTES"').replace(b": [1, 4]", b":[1, 4]"), LENGTH),
        (json.dumps({**ANSWER, "outputs": []}).encode(), {}),
    ],
)
def test_answer_that_is_none(body: bytes, headers: dict[str, str]):
    with http_server(200, body, headers) as (url, _):
        raised = attempt(url, embed)
    assert type(raised) is radapter_client.ServerError and "\n" not in str(raised)


def test_every_request_with_a_body_says_what_it_is():
    """curl's default type, with 4 MiB and more, ends some servers. Connections are kept."""
    asked: list[Callable[[Client], Any]] = [
        lambda client: client.is_ready(),
        lambda client: client.release(),
        lambda client: client.classify([b"x"] * 40, ["a"]),
        lambda client: client.embed_texts(["x" * 5_000_000]),
        lambda client: client.search("x", index="i"),
        lambda client: client.segment(b"x", ["a"]),
    ]
    with http_server(400, b"{}") as (url, seen):
        for ask in asked:
            attempt(url, ask, release=1)
    assert {method for method, *_ in seen} == {"GET", "POST"}
    for method, _, headers, body, _ in seen:
        assert headers["Content-Type"] == ("application/octet-stream" if method == "POST" else None)
        assert method == "POST" or not body
    with http_server(200, GOOD, LENGTH) as (url, seen):
        attempt(url, lambda client: [embed(client) for _ in range(5)])
    assert len(seen) == 5 and len({caller for *_, caller in seen}) == 1


# A class that is private, and an object's place in memory.
INNARDS = re.compile(r"\b_[A-Z]|\bat 0x")


@pytest.mark.parametrize("protocol", ["grpc", "http", "https"])
@pytest.mark.parametrize("host", ["127.0.0.1", "a" * 70 + ".com"])
def test_a_server_that_does_not_answer_is_named_by_host_and_port(protocol: str, host: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = url_of(listener, protocol, host)
    raised = attempt(url, embed, timeout=5, retries=0)
    assert type(raised) is radapter_client.ServerUnavailable
    assert re.search(rf"{url[-20:]}: .*radapter-serve", str(raised))
    assert not INNARDS.search(str(raised))
    assert attempt(url, lambda client: client.is_ready(), timeout=5) is False


def test_a_certificate_that_is_not_trusted_is_said_to_be_so():
    settings = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(settings)

    def serve(caller: socket.socket) -> None:
        settings.wrap_socket(caller, server_side=True)

    with serving(serve, "https") as url:
        raised = attempt(url, embed, retries=0)
    assert type(raised) is radapter_client.ServerUnavailable
    assert f"{url}: its certificate is not trusted: " in str(raised)
    assert not INNARDS.search(str(raised)) and "_ssl" not in str(raised)


# Time


@pytest.mark.parametrize(("protocol", "timeout"), [("http", 0.1), ("grpc", 0.1), ("grpc", 0.6)])
def test_silence_is_a_timeout(
    silent: socket.socket, protocol: str, timeout: float, monkeypatch: pytest.MonkeyPatch
):
    """gRPC itself gives up after a second, here after less, and remembers the first failure."""
    sooner = [(name, min(value, 300)) for name, value in triton.CHANNEL]
    monkeypatch.setattr(triton, "CHANNEL", sooner)
    start = time.monotonic()
    for _ in range(2 if protocol == "grpc" and timeout < 0.3 else 1):
        assert type(attempt(url_of(silent, protocol), embed, timeout=timeout)) is Timeout
    assert time.monotonic() - start < 2 * timeout + 2


@pytest.mark.parametrize(
    ("start", "keep"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"Connection: close\r\n"),
    ],
)
def test_an_answer_that_comes_byte_by_byte_is_late(start: bytes, keep: bytes):
    """Its head is long, or its body; no thread goes on for longer than the call."""

    def drip(caller: socket.socket) -> None:
        caller.sendall(start.replace(b"OK\r\n", b"OK\r\n" + keep))
        for _ in range(1000):  # 20 s
            time.sleep(0.02)
            caller.sendall(b"x")

    with serving(drip) as url:
        begin = time.monotonic()
        assert type(attempt(url, embed, timeout=0.15)) is Timeout
        assert time.monotonic() - begin < 10


def test_a_name_that_is_looked_up_for_long_is_late(monkeypatch: pytest.MonkeyPatch):
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(20))
    begin = time.monotonic()
    assert type(attempt("http://far.example", embed, timeout=0.2)) is Timeout
    ended.set()
    assert time.monotonic() - begin < 10


@pytest.mark.skipif(sys.platform != "linux", reason="a full queue answers nothing there alone")
@pytest.mark.parametrize("good", [True, False])
def test_each_address_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch, good: bool):
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        url, _ = stack.enter_context(http_server(200, GOOD, LENGTH))
        addresses = [full.getsockname()] * 3
        if good:
            addresses.append(("127.0.0.1", int(url.rpartition(":")[2])))
        infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
        begin = time.monotonic()
        answer = attempt("http://many.example", embed, timeout=1)
        assert time.monotonic() - begin < 2.5  # and not a second for each address
        assert isinstance(answer, np.ndarray) if good else type(answer) is Timeout


def test_a_slow_handshake_takes_from_the_time_of_the_answer(monkeypatch: pytest.MonkeyPatch):
    """Neither the handshake nor the answer is late by itself."""
    authority = trustme.CA()
    settings = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(settings)
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(GOOD)]
    head += [f"{name}: {value}".encode() for name, value in LENGTH.items()]

    def serve(accepted: socket.socket) -> None:
        time.sleep(0.2)
        with settings.wrap_socket(accepted, server_side=True) as caller:
            caller.recv(65536)
            time.sleep(0.2)
            caller.sendall(b"\r\n".join([*head, b"", GOOD]))

    with authority.cert_pem.tempfile() as trusted, serving(serve, "https") as url:
        monkeypatch.setenv("SSL_CERT_FILE", trusted)
        assert type(attempt(url, embed, timeout=0.35, retries=0)) is Timeout


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_hanging_up_is_no_timeout(protocol: str):
    with serving(socket.socket.close, protocol) as url:
        raised = attempt(url, embed, timeout=5)
    assert type(raised) is radapter_client.ServerUnavailable


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(("kind", "count"), [(Client, 1), (Client, 5), (AsyncClient, 5)])
def test_close_ends_calls_that_wait(silent: socket.socket, protocol: str, kind: type, count: int):
    """They end at once, and not when the time-out of their requests is over."""
    start = time.monotonic()
    options: dict[str, Any] = {"batch_size": 1, "release": 1, "timeout": 30}

    async def main() -> None:
        client = AsyncClient(url_of(silent, protocol), **options)
        waiting = asyncio.ensure_future(client.embed_texts(["x"] * count))
        await asyncio.sleep(0.3)
        await client.close()
        with pytest.raises(radapter_client.RAdapterClientError, match="closed in the middle"):
            await waiting
        with pytest.raises(radapter_client.RAdapterClientError, match="make a new one"):
            await client.embed_texts(["x"])

    if kind is AsyncClient:
        asyncio.run(main())
    else:
        client = Client(url_of(silent, protocol), **options)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(client.embed_texts, ["x"] * count)
            time.sleep(0.3)
            client.close()
            with pytest.raises(radapter_client.RAdapterClientError, match="closed in the middle"):
                waiting.result()
    assert time.monotonic() - start < 5


def test_a_cancelled_call_ends_at_once_and_sends_no_more():
    """A request that it has sent goes on until its time-out, and no longer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options: dict[str, Any] = {"concurrency": 1, "batch_size": 1, "release": 1}

        async def main() -> None:
            async with AsyncClient(url_of(listener), timeout=0.3, **options) as client:
                call = asyncio.ensure_future(client.embed_texts(["x"] * 9))
                with (await asyncio.to_thread(listener.accept))[0] as caller:
                    call.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await call
                    caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    with pytest.raises(ConnectionError):  # the client has hung up
                        for _ in range(150):
                            await asyncio.sleep(0.02)
                            caller.sendall(b"x")
                listener.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    await asyncio.to_thread(listener.accept)

        asyncio.run(main())


# Retries, and keys


def refusal(status: int, text: str = "[overloaded] busy", **headers: str) -> Any:
    """The answer of a server that refuses a request."""
    return status, json.dumps({"error": text}).encode(), headers


BUSY = refusal(429)
STOPS = refusal(503, "[server_stopping] it stops")
EMBEDDING = {"name": "text_embeds", "datatype": "FP32", "shape": [1, 1], "data": [7]}
EMBEDDED = json.dumps({**ANSWER, "outputs": [EMBEDDING]}).encode()


@pytest.mark.parametrize(
    ("steps", "options", "asked", "error"),
    [
        ([], {}, 1, None),
        ([None, STOPS], {}, 3, None),
        ([refusal(502), None], {}, 3, None),
        *(([BUSY] * 3, {"retries": count}, count + 1, "ServerUnavailable") for count in (0, 1)),
        # A request that is wrong or late is not sent again.
        ([refusal(413, "[any] no")], {}, 1, "InvalidRequest"),
        ([refusal(401, "[any] no")], {}, 1, "Unauthorized"),
        *(([refusal(status, "[any] no")], {}, 1, "Timeout") for status in (408, 504)),
        # A wait beyond the time-out is not begun.
        ([refusal(429, **{"Retry-After": "30"})], {"timeout": 5}, 1, "ServerUnavailable"),
        *(
            ([refusal(429, **{"Retry-After": wait})], {"timeout": 5}, 2, None)
            for wait in ("none", "-5")
        ),
    ],
)
def test_what_is_asked_again_over_http(
    steps: list[Any], options: dict[str, Any], asked: int, error: str | None
) -> None:
    with http_server(200, EMBEDDED, first=steps) as (url, seen):
        answer = attempt(url, embed, **options)
    assert len(seen) == asked
    if error is None:
        assert answer.tolist() == [[7]]
    else:
        assert type(answer).__name__ == error
        wait = steps[0][2].get("Retry-After", "0")
        assert getattr(answer, "retry_after", 0.0) == float(wait)


def test_over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures after which it asks again, the key in a header, an answer without its numbers."""
    answer = service_pb2.ModelInferResponse(model_version="1")
    answer.outputs.add(name="text_embeds", datatype="FP32", shape=[1, 1])
    answer.raw_output_contents.append(np.float32(7).tobytes())
    away = grpc.StatusCode.UNAVAILABLE
    failures = (away, "[server_stopping] x"), (away, "y")
    with grpc_server(*failures, answer=answer.SerializeToString()) as (url, seen):
        assert attempt(url, embed, api_key="secret").tolist() == [[7]]
        assert len(seen) == 3 and seen[-1]["authorization"] == "Bearer secret"
    with grpc_server((grpc.StatusCode.DEADLINE_EXCEEDED, "late")) as (url, seen):
        assert type(attempt(url, embed)) is Timeout and len(seen) == 1
    answer.outputs.add(name="more", datatype="FP32", shape=[1, 1])
    with grpc_server(answer=answer.SerializeToString()) as (url, _):
        assert type(attempt(url, embed)) is radapter_client.ServerError
    secure = Mock(return_value=grpc.insecure_channel("x"))
    monkeypatch.setattr(grpc, "secure_channel", secure)
    Client("grpcs://example.com").close()
    assert secure.call_args.args[2] == triton.CHANNEL


def test_whether_it_is_ready_is_asked_once() -> None:
    with http_server(*STOPS) as (url, seen):
        assert attempt(url, lambda client: client.is_ready()) is False
        # Of five tasks; what waits for a thread after the first failure is not sent.
        assert len(seen) <= 5


@pytest.mark.parametrize("key", ["", "two words", "line\n", "ü", 5])
def test_keys_that_are_none(key: Any) -> None:
    with pytest.raises(radapter_client.InvalidRequest, match="api_key is not a key") as caught:
        Client(api_key=key)
    assert not key or str(key) not in str(caught.value).split()


def test_a_key_in_the_clear_is_warned_of() -> None:
    for url, better in (("http://example.com", "https"), ("grpc://192.0.2.1:8001", "grpcs")):
        with pytest.warns(UserWarning, match=rf"to \w+://.* in the clear; use {better}:"):
            Client(url, api_key="secret").close()
    for url in ("http://[::1]:1", "grpc://127.0.0.1:1", "https://example.com"):
        Client(url, api_key="secret").close()


def test_the_command_takes_the_key_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RADAPTER_API_KEY", "secret")
    call = ["embed-text", "x", "--out", str(tmp_path / "a.npy"), "--url"]
    with http_server(200, EMBEDDED) as (url, seen):
        assert query.main([*call, url]) == 0
    assert seen[0][2]["Authorization"] == "Bearer secret"
    assert "note" not in capsys.readouterr().err
    query.main([*call, "http://127.0.0.1.invalid:1"])
    assert "note: the API key travels to http://127.0.0.1.inva" in capsys.readouterr().err
    with http_server(*refusal(401, "[unauthorized] send a key")) as (url, _):
        assert query.main([*call, url]) == 2
    assert "RADAPTER_API_KEY" in capsys.readouterr().err
