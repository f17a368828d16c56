"""Servers that send too much, too slowly or nonsense end a call with one of the client's errors."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from radapter_client import Client, RAdapterClientError, Release, ServerError, Timeout, _http
from radapter_client import grpc as triton
from radapter_client.tensors import unpack
from tests.helpers.answering import listening
from tests.helpers.stand_ins import grpc_server, http_server

CALLS: dict[str, Callable[[Client], Any]] = {
    "classify": lambda client: client.classify(b"image", ["a"]),
    "segment": lambda client: client.segment(b"image", ["a"]),
    "search": lambda client: client.search("a", index="i", offset=0, thumbnails=True),
    "embed_texts": lambda client: client.embed_texts(["a"]),
    "no texts": lambda client: client.embed_texts([]),
    "list": lambda client: client.embed_images([b"image"] * 40),
    "release": lambda client: client.release(),
    "indexes": lambda client: client.indexes(),
    "is_ready": lambda client: client.is_ready(),
}


@contextlib.contextmanager
def sending(start: bytes, again: bytes = b"") -> Iterator[str]:
    """A server that answers each connection with some bytes, and goes on without a pause."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the end
                while True:
                    with listener.accept()[0] as caller, contextlib.suppress(OSError):
                        caller.recv(65536)
                        caller.sendall(start)
                        while again:
                            caller.sendall(again)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


HEAD = b"HTTP/1.1 200 OK\r\n"
FLOODS = [
    (HEAD + b"\r\n", b"x" * 4096),
    (HEAD + b"Content-Length: 1000000000000\r\n\r\n", b"x" * 4096),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    (b"HTTP/1.1 500 Fault\r\n\r\n", b"x" * 4096),
]


@pytest.mark.parametrize(("start", "again"), FLOODS)
def test_bytes_that_keep_coming_are_late(
    start: bytes, again: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http, "MAX_ANSWER", 2**40)
    with sending(start, again) as url, Client(url, timeout=0.3, retries=0) as client:
        begin = time.monotonic()
        with pytest.raises(Timeout):
            client.embed_texts(["a"])
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize(("start", "again"), FLOODS)
def test_an_answer_has_a_bound(start: bytes, again: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "MAX_ANSWER", 2**20)
    with sending(start, again) as url, Client(url, timeout=60, retries=0) as client:
        error = failure(client, CALLS["embed_texts"])
    assert type(error) is ServerError and "more than 1,048,576 bytes" in str(error)


def in_json(datatype: str = "FP32", shape: Any = (1, 1), data: Any = (1.0,), **head: Any) -> bytes:
    """An answer with all outputs that a task has, each the same."""
    names = ("label", "score", "mask", "id", "metadata", "thumbnail", "index_version")
    outputs = [
        {"name": name, "datatype": datatype, "shape": shape, "data": data}
        for name in (*names, "text_embeds", "image_embeds")
    ]
    return json.dumps({"model_version": "1", "outputs": outputs, **head}).encode()


DEEP = b"[" * 100_000
BODIES = {
    "deep": DEEP,
    "infinite version": in_json(model_version=float("inf")),
    "long version": in_json(model_version="9" * 5000),
    "numbers as texts": in_json("BYTES", data=[5]),
    "numbers": in_json(),
    "texts": in_json("BYTES", (1,), ["a"]),
    "table of texts": in_json("BYTES", data=["a"]),
    "no rows": in_json(shape=[0, 4], data=[]),
    "many axes": in_json(shape=[1] * 100),
    "shape": in_json(shape=[2**40, -1]),
    "outputs": json.dumps({"model_version": 1, "outputs": 5}).encode(),
    "output": json.dumps({"model_version": 1, "outputs": [None]}).encode(),
    "null": b"null",
    "number": b"1e999",
    "long number": b"9" * 5000,
    "parameters": b'{"parameters": [], "indexes": 5}',
    "parameter": b'{"parameters": {"release.1": null}, "indexes": null}',
    "not UTF-8": b'{"parameters": "\xff"}',
}


def in_config(text: str) -> bytes:
    return json.dumps({"parameters": {"release.1": {"string_value": text}}}).encode()


def release_of(**facts: Any) -> bytes:
    known = {
        **{"version": 1, "alpha": 0.5, "architecture": "x", "precision": "fp32", "embed_dim": 4},
        **{"logit_scale": 100.0, "templates": ["{}"], "label_sets": {}},
    }
    return in_config(json.dumps(known | facts))


BODIES |= {
    "infinite release": release_of(version=float("inf")),
    "negative width": release_of(embed_dim=-5),
    "label sets": release_of(label_sets=[5]),
    "deep facts": in_config("[" * 50_000),
}


def failure(client: Client, call: Callable[[Client], Any]) -> RAdapterClientError | None:
    """The error of a call; every other one goes on."""
    try:
        call(client)
    except RAdapterClientError as error:
        return error
    return None


@pytest.mark.parametrize("status", [200, 400, 503])
def test_nonsense_raises_nothing_but_the_errors_of_the_client(status: int) -> None:
    body = b""
    with (
        listening(lambda *_: (status, {}, body)) as port,
        Client(f"http://127.0.0.1:{port}", retries=0) as client,
    ):
        for name in BODIES:
            body = BODIES[name]
            errors = {method: failure(client, call) for method, call in CALLS.items()}
            for error in filter(None, errors.values()):
                assert "\n" not in str(error) and len(str(error)) < 400
            assert errors["classify"] is not None, name


def test_facts_of_another_type_do_not_break_a_property() -> None:
    with http_server(200, release_of(preprocess=[5])) as (url, _), Client(url) as client:
        release: Release = client.release()
        assert release.exif_orientation is True


@pytest.mark.parametrize("wait", ["9" * 400, "9" * 5000, "Mon, 99 Foo 99999 99:99:99 GMT"])
def test_a_wait_without_end_is_not_waited_for(wait: str) -> None:
    with http_server(503, b"{}", {"Retry-After": wait}) as (url, _), Client(url) as client:
        assert type(failure(client, CALLS["embed_texts"])).__name__ == "ServerUnavailable"


@pytest.mark.parametrize("length", [f"Content-Length: {2**70}", "Transfer-Encoding: chunked"])
def test_a_length_beyond_memory_allocates_nothing(length: str) -> None:
    start = HEAD + length.encode() + b"\r\n\r\n" + b"f" * 16 + b"\r\nx"
    with sending(start) as url, Client(url, retries=0) as client:
        assert failure(client, CALLS["embed_texts"]) is not None


def test_no_coding_of_an_answer_is_undone() -> None:
    good = in_json(data=[7.0])
    coding = {"Content-Encoding": "gzip"}
    with http_server(200, gzip.compress(good), coding) as (url, seen), Client(url) as client:
        assert type(failure(client, CALLS["embed_texts"])) is ServerError
    assert seen[0][2]["Accept-Encoding"] == "identity"


def test_json_and_texts_have_bounds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "MAX_JSON", 100)
    with http_server(200, in_json()) as (url, _), Client(url) as client:
        error = failure(client, CALLS["embed_texts"])
    assert type(error) is ServerError and "at most 100 are read" in str(error)
    with pytest.raises(ValueError, match="texts; at most"):
        unpack(bytes(4 * (2**22 + 1)), "BYTES", [2**22 + 1])


def test_an_answer_over_grpc_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [pair for pair in triton.CHANNEL if "receive" not in pair[0]]
    monkeypatch.setattr(triton, "CHANNEL", [*options, ("grpc.max_receive_message_length", 1000)])
    with grpc_server(answer=bytes(2000)) as (url, _), Client(url, retries=0) as client:
        error = failure(client, CALLS["embed_texts"])
    assert type(error) is ServerError and "more than 268,435,456 bytes" in str(error)
    assert dict(options)["grpc.max_send_message_length"] == -1


def grpc_answers() -> Iterator[bytes]:
    """Answers to an inference that gRPC itself can read."""
    for version, datatype, shape, data in (
        ("9" * 5000, "FP32", [1, 1], np.float32(1).tobytes()),
        ("x", "FP32", [1, 1], np.float32(1).tobytes()),
        ("1", "CATS", [1, 1], b""),
        ("1", "BYTES", [2**40], b""),
        ("1", "FP32", [1] * 100, np.float32(1).tobytes()),
        ("1", "FP32", [0, 4], b""),
    ):
        answer = service_pb2.ModelInferResponse(model_version=version)
        answer.outputs.add(name="text_embeds", datatype=datatype, shape=shape)
        answer.raw_output_contents.append(data)
        yield answer.SerializeToString()
    config = service_pb2.ModelConfigResponse()
    config.config.parameters["release.1"].string_value = "[" * 50_000
    yield config.SerializeToString()
    yield b"\xff\xff\xff"


@pytest.mark.parametrize("answer", list(grpc_answers()))
def test_nonsense_over_grpc_raises_nothing_but_the_errors_of_the_client(answer: bytes) -> None:
    with grpc_server(answer=answer) as (url, _), Client(url, retries=0) as client:
        for call in CALLS.values():
            failure(client, call)
        error = failure(client, CALLS["embed_texts"])
        assert error is not None and re.search("answer|Exception", str(error))
