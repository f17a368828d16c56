"""Answers: their memory and the place of their key until the last byte is sent, and large ones that
threads write.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_client import Client, Reply
from radapter_client._http import decode
from radapter_serve.encoders.loaded import load_release
from radapter_serve.gateway import access, kserve
from radapter_serve.gateway.access import Lease, MemoryBudget
from radapter_serve.gateway.app import PIECE, Answer
from radapter_serve.gateway.in_process import InProcess
from radapter_serve.gateway.settings import Timeouts
from radapter_serve.gateway.upstream import SMALL, Entry, Inference
from radapter_serve.index.build import build
from radapter_serve.release.release import TASKS
from tests.gateway.test_bodies import body_bytes
from tests.gateway.test_gateway import ALIVE, HEAD
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import (
    INFER,
    TEXT,
    FakeUpstream,
    Served,
    config,
    packed,
    serving,
    until,
)
from tests.helpers.small_release import png
from tests.helpers.ways import in_process

MIB = 2**20
BINARY = {**TEXT, "parameters": {"binary_data_output": True}}
BODY = json.dumps(BINARY).encode()
SEGMENT = "/v2/models/segment/infer"
ASK = HEAD + b"Content-Length: %d\r\n" % len(BODY)


def large(served: Served, size: int = 16 * MIB) -> None:
    """Let every answer have so many bytes."""
    served.upstream.outputs = {"text_embeds": np.zeros((1, size // 4), np.float32)}


def metric(served: Served, name: str) -> float:
    [value] = re.findall(rf"^radapter_gateway_{name} (\S+)", served.metrics(), re.MULTILINE)
    return float(value)


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


class HeldMasks(FakeUpstream):
    """A stand-in that keeps masks back, as `hold` says, and answers all else."""

    async def infer(self, inference: Inference, timeout: float, entry: Entry) -> Reply:
        if inference.model != "segment":
            return Reply(1, self._answer(inference))
        return await super().infer(inference, timeout, entry)


def segment_of(width: int, height: int) -> dict[str, Any]:
    """A request for the mask of a small file."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    return {
        "inputs": [
            {"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]},
            {"name": "labels", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]},
        ],
        "parameters": {"binary_data_output": True},
    }


def test_the_memory_of_a_mask_is_held_before_it_is_made() -> None:
    with serving(HeldMasks, max_body=1) as served, ThreadPoolExecutor(1) as caller:
        served.hold()
        mask = np.zeros((1000, 1500), np.uint16)
        served.upstream.outputs = {"mask": mask}
        asked = caller.submit(served.ask, SEGMENT, segment_of(1500, 1000))
        until(lambda: served.upstream.asked)
        assert mask.nbytes <= body_bytes(served) < 1.1 * mask.nbytes
        served.let_go()
        assert asked.result()[0] == 200
        until(lambda: body_bytes(served) == 0)


def test_large_answers_that_are_made_leave_half_the_memory_to_others() -> None:
    """Of 64 MiB, two masks of 15 MB are asked for; the others wait until one of them is there."""
    with (
        serving(HeldMasks, max_body=1, max_memory=64) as served,
        ThreadPoolExecutor(8) as callers,
    ):
        served.hold()
        served.upstream.outputs = {"mask": np.zeros((2500, 3000), np.uint16)}
        masks = [callers.submit(served.ask, SEGMENT, segment_of(3000, 2500)) for _ in range(6)]
        until(lambda: metric(served, "running") == 6)
        until(lambda: len(served.upstream.asked) == 2)
        assert 30e6 < body_bytes(served) < 32 * MIB
        # Others don't wait, whether their answers are small or not.
        assert served.ask(INFER, TEXT)[0] == 200
        assert served.ask("/v1/embeddings", {"model": "radapter", "input": ["a"] * 2000})[0] == 200
        # Whoever leaves makes room for the next.
        left = served.upstream.cancelled
        with served.connection() as it:
            body = json.dumps(segment_of(1500, 1500)).encode()
            head = f"POST {SEGMENT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            it.sendall(f"{head}\r\n\r\n".encode() + body)
            until(lambda: metric(served, "running") == 7)
        until(lambda: metric(served, "running") == 6)
        assert served.upstream.cancelled == left and len(served.upstream.asked) == 2
        served.let_go()
        assert [mask.result()[0] for mask in masks] == [200] * 6
        until(lambda: body_bytes(served) == 0)


def test_an_answer_that_is_made_lets_the_next_begin_while_its_memory_is_held() -> None:
    async def main() -> None:
        budget = MemoryBudget(20 * MIB, 8)

        async def make(lease: Lease) -> int:
            async with budget.making(lease, 10 * MIB):
                return budget.held

        with budget.lease() as first, budget.lease() as second:
            async with budget.making(first, 10 * MIB):
                making = asyncio.ensure_future(make(second))
                await asyncio.sleep(0.01)
                assert not making.done() and second.size == 0
            assert await asyncio.wait_for(making, 10) == 20 * MIB

    asyncio.run(main())


def test_a_mask_larger_than_all_memory_is_made_alone() -> None:
    with serving(HeldMasks, max_body=1, max_memory=2) as served:
        mask = np.zeros((2000, 2000), np.uint16)
        served.upstream.outputs = {"mask": mask}
        assert served.ask(SEGMENT, segment_of(2000, 2000))[0] == 200


def test_an_answer_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access, "FREE_SECONDS", 0.1)
    with serving(max_body=1, max_memory=24) as served:
        large(served)
        with served.connection(ASK + b"\r\n" + BODY) as slow:
            slow.recv(1)
            assert served.refusal(SEGMENT, segment_of(3000, 2500)) == (429, "overloaded")
        assert [asked.model for asked in served.upstream.asked] == ["embed_text"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_take_at_most_the_memory_that_is_held_before(
    task: str, releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each task, with the most that its answer may have."""
    photos = tmp_path / "photos"
    photos.mkdir()
    files = [png(number) for number in range(5)]
    for number, file in enumerate(files):
        (photos / f"{number}.png").write_bytes(file)
    build(str(photos), tmp_path / "indexes" / "photos", load_release(releases))
    sizes: list[tuple[int, int]] = []
    infer = InProcess.infer

    async def noted(self: Any, request: Inference, timeout: float, entry: Entry) -> Reply:
        reply = await infer(self, request, timeout, entry)
        if not request.is_probe:
            size = sum(
                array.nbytes if array.dtype != object else sum(map(sys.getsizeof, array.ravel()))
                for array in reply.outputs.values()
            )
            sizes.append((size, request.answer_size))
        return reply

    monkeypatch.setattr(InProcess, "infer", noted)
    labels = [f"colour {number}" for number in range(500)]
    requests: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
        "embed_image": ("embed_images", [files], {}),
        "embed_text": ("embed_texts", [["a"] * 60], {}),
        "classify": ("classify", [files, labels], {"top_k": 500}),
        "retrieve": ("search", ["a cat"], {"index": "photos", "thumbnails": True, "top_k": 5}),
        "segment": ("segment", [files[0], labels], {}),
    }
    method, arguments, options = requests[task]
    with (
        in_process(releases, tmp_path / "indexes") as running,
        Client(running.url) as client,
    ):
        getattr(client, method)(*arguments, **options)
    assert sizes
    for size, most in sizes:
        assert 0 < size <= most < 3 * size + 2**16


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({}, 5),
        ({"top_k": [[7], [3]]}, 7),
        ({"top_k": [[2**31 - 1], [1]]}, 1000),
        ({"multi_label": [[True], [False]]}, 1000),
    ],
)
def test_an_answer_with_a_label_set_has_as_many_labels_as_asked_for(
    more: dict[str, Any], count: int
) -> None:
    sets = {"few": {"labels": 3}, "many": {"labels": 1000}}
    model = config("classify", {**release(1), "label_sets": sets})
    kinds = {"top_k": "INT32", "multi_label": "BOOL"}
    inputs = [
        {"name": "image", "shape": [2, 1], "datatype": "BYTES", "data": ["eA==", "eA=="]},
        {"name": "label_set", "shape": [2, 1], "datatype": "BYTES", "data": ["few", "many"]},
        *({"name": n, "shape": [2, 1], "datatype": kinds[n], "data": d} for n, d in more.items()),
    ]
    body = json.dumps({"inputs": inputs}).encode()
    each = kserve._LABEL_BYTES + kserve._SCORE_BYTES
    assert kserve.read(body, len(body), model).answer_size == 2 * (2**10 + each * count)


def test_an_answer_is_sent_in_pieces_without_a_copy() -> None:
    array = np.arange(PIECE, dtype=np.uint16)
    outputs = {"mask": array, "label": np.array([b"a"], object)}
    request = Inference("segment", "", {}, binary=frozenset(outputs))
    parts, headers = kserve.write(Reply(1, outputs), request)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Answer(parts, headers)({}, None, send))  # type: ignore[arg-type]
    start, *messages = sent
    assert (b"content-length", str(sum(map(len, parts))).encode()) in start["headers"]
    # uvicorn sends a message once the one before is taken, so the last one, too.
    head = len(parts[0])
    assert [len(message["body"]) for message in messages] == [head, PIECE, PIECE, 5, 0]
    assert [message.get("more_body", False) for message in messages] == [True] * 4 + [False]
    assert b"".join(message["body"] for message in messages) == b"".join(parts)
    assert np.shares_memory(messages[1]["body"], array)


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
    """Names of the threads that have written answers; the inputs are gone by then."""
    names: list[str] = []
    write = kserve.write

    def noted(reply: Reply, request: Inference) -> Any:
        assert not request.inputs
        names.append(threading.current_thread().name)
        return write(reply, request)

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
    parts, _ = kserve.write(Reply(1, outputs), Inference("classify", "", {}, id='an "id"'))
    answer = json.loads(b"".join(parts))
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
    parts, headers = kserve.write(Reply(1, outputs), binary)
    read = decode(b"".join(parts), headers[kserve.HEADER_LENGTH])
    assert np.array_equal(read.outputs["score"], numbers)
    assert packed(read.outputs["label"]) == packed(outputs["label"])


ANSWERS = """
import asyncio, sys, threading
import numpy as np, psutil
from radapter_serve.gateway import access

access.TRIM_SECONDS = 0.01
size = 12 * 2**20
process = psutil.Process()
blocks = []

def make():  # in a heap of its own thread, with a small block that stays between two large ones
    for _ in range(4):
        blocks.append((np.ones(size, np.uint8), [bytearray(5000) for _ in range(20)]))
        small.append(blocks[-1][1])

small = []

async def main():
    budget = access.MemoryBudget(2**30, 8.0)
    trimming = asyncio.ensure_future(budget.trim())
    await asyncio.sleep(0)
    np.ones(24 * 2**20, np.uint8)
    before = process.memory_info().rss
    with budget.lease() as lease:
        lease.hold(2**25)
        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = process.memory_info().rss - before
        blocks.clear()
    await asyncio.sleep(0.3)
    print(taken, process.memory_info().rss - before)
    trimming.cancel()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to")
def test_the_memory_of_large_answers_goes_back_to_the_system() -> None:
    command = [sys.executable, "-c", ANSWERS]
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    taken, left = map(int, output.split())
    assert taken > 180 * MIB and left < 40 * MIB
