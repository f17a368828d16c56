"""Answers: their memory and the place of their key until the last byte is sent, and large ones that
threads write.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Reply
from radapter_client._http import decode
from radapter_serve.gateway import kserve
from radapter_serve.gateway.middleware import PIECE, Pieces
from radapter_serve.gateway.settings import Timeouts
from radapter_serve.gateway.upstream import SMALL, Inference
from tests.gateway.test_bodies import body_bytes
from tests.gateway.test_gateway import ALIVE, HEAD
from tests.helpers.fake_upstream import INFER, TEXT, Served, packed, serving, until

MIB = 2**20
BINARY = {**TEXT, "parameters": {"binary_data_output": True}}
BODY = json.dumps(BINARY).encode()
ASK = HEAD + b"Content-Length: %d\r\n" % len(BODY)


def large(served: Served, size: int = 16 * MIB) -> None:
    """Let every answer have so many bytes."""
    served.upstream.outputs = {"text_embeds": np.zeros((1, size // 4), np.float32)}


def read_all(it: socket.socket) -> int:
    """Read what comes until nothing is left, and count its bytes."""
    return sum(map(len, iter(lambda: it.recv(MIB), b"")))


def test_an_answer_counts_as_memory_until_its_last_byte_is_sent() -> None:
    with serving() as served:
        large(served)
        with served.connection(ASK + b"\r\n" + BODY) as it, it.makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            assert 16 * MIB < body_bytes(served) < 17 * MIB
            size = int(http.client.parse_headers(answer)["Content-Length"])
            assert len(answer.read(size)) == size > 16 * MIB
            until(lambda: body_bytes(served) == 0)
            it.sendall(ALIVE)  # on the same connection
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"


def test_the_last_piece_of_an_answer_is_waited_for() -> None:
    body = bytes(range(256)) * (PIECE // 256) * 2 + b"end"
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.body", "body": body})

    async def send(message: Any) -> None:
        sent.append(message)

    pieces: Any = Pieces(app)
    asyncio.run(pieces({}, None, send))
    # uvicorn sends a message once the one before is taken.
    assert [len(message["body"]) for message in sent] == [PIECE, PIECE, 3, 0]
    assert [message.get("more_body", False) for message in sent] == [True, True, True, False]
    assert b"".join(message["body"] for message in sent) == body


def test_answers_that_do_not_fit_are_refused_and_slow_readers_give_way() -> None:
    size = 48 * MIB
    with serving(max_body=1, max_memory=64, timeouts=Timeouts(piece=0.5)) as served:
        large(served, size)
        with served.connection() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
            slow.sendall(ASK + b"\r\n" + BODY)
            slow.recv(1)
            assert served.refusal(INFER, BINARY) == (429, "overloaded")
            # It reads on, faster than it must, but for longer than a piece may take.
            is_over = threading.Event()
            count = 0

            def read() -> None:
                nonlocal count
                while not is_over.wait(0.02) and (part := slow.recv(2**17)):
                    count += len(part)

            reading = threading.Thread(target=read)
            reading.start()
            until(lambda: served.ask(INFER, BINARY)[0] == 200)
            is_over.set()
            reading.join()
            assert count + read_all(slow) < size
        until(lambda: body_bytes(served) == 0)


def test_an_answer_has_the_place_of_its_key_until_its_last_byte_is_sent(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"ann: {hashlib.sha256(b'a').hexdigest()} at_once=1\n")
    with serving(api_keys=tmp_path / "keys") as served:
        large(served)
        key = b"Authorization: Bearer a\r\nConnection: close\r\n\r\n"
        with served.connection(ASK + key + BODY) as it:
            it.recv(1)
            served.upstream.outputs = None
            assert served.refusal(INFER, TEXT, Authorization="Bearer a") == (429, "rate_limited")
            read_all(it)
        until(lambda: served.ask(INFER, TEXT, Authorization="Bearer a")[0] == 200)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the threads that have written answers."""
    names: list[str] = []
    write = kserve.write

    def noted(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr(kserve, "write", noted)
    yield names


def test_a_large_answer_is_written_in_a_thread(writers: list[str], served: Served) -> None:
    for size in (SMALL, SMALL + 4, 5 * MIB):
        large(served, size)
        assert served.ask(INFER, BINARY)[0] == 200
    assert writers[0] not in ("middle-bodies", "large-bodies")
    assert writers[1:] == ["middle-bodies", "large-bodies"]


@pytest.mark.parametrize("count", [0, 1, 2**12, 2**12 + 1, 10_000])
def test_json_of_many_values_is_what_they_are(count: int) -> None:
    numbers = np.random.default_rng(0).normal(size=(1, count)).astype(np.float32)
    texts = np.array([f'"{number}", \u732b' for number in range(count)], object)
    outputs = {"score": numbers, "label": np.array([text.encode() for text in texts], object)}
    content, _ = kserve.write(Reply(1, outputs), Inference("classify", "", {}, id='an "id"'))
    answer = json.loads(content)
    assert answer["id"] == 'an "id"' and list(answer) == [
        *("id", "model_name", "model_version", "outputs")
    ]
    scores, labels = answer["outputs"]
    assert scores == {
        **{"name": "score", "datatype": "FP32", "shape": [1, count]},
        "data": numbers.ravel().tolist(),
    }
    assert labels["data"] == texts.tolist()
    # In binary the client reads the same.
    binary = Inference("classify", "", {}, binary=frozenset(outputs))
    content, headers = kserve.write(Reply(1, outputs), binary)
    read = decode(content, headers[kserve.HEADER_LENGTH])
    assert np.array_equal(read.outputs["score"], numbers)
    assert packed(read.outputs["label"]) == packed(outputs["label"])
