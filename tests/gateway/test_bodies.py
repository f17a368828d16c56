"""Bodies that are large or dear: the others are answered meanwhile, and nothing of them stays."""

from __future__ import annotations

import gc
import json
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from radapter_serve.gateway import app, kserve, openai
from radapter_serve.gateway.app import FEW
from radapter_serve.gateway.kserve import MAX_JSON_LISTS, json_memory
from radapter_serve.gateway.upstream import LOG, SMALL, Inference, Refused
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

EMBEDDINGS = "/v1/embeddings"
MIB = 2**20
MIDDLE = 2**19  # in place of the gateway's own
IMAGE = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["eA=="]}


def text_of(size: int) -> dict[str, Any]:
    """A request with a text of so many bytes."""
    return {"inputs": [{**TEXT["inputs"][0], "data": ["x" * size]}]}


# Memory


@pytest.mark.parametrize("element", [b"[],", b"[[[1]]],", b'{"a":1},', b'"[",'])
def test_json_of_too_many_lists_and_objects_is_refused_unread(
    element: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kserve, "Header", None)
    body = b'{"inputs": [' + element * (MAX_JSON_LISTS + 1) + b"1]}"
    with pytest.raises(Refused, match="65536 brackets and colons; send tensors in binary"):
        kserve.from_json(kserve.Header, body, "send tensors in binary")


def test_json_of_as_many_lists_as_are_allowed_is_read() -> None:
    body = b'{"inputs": [' + b"[]," * (MAX_JSON_LISTS - 9) + b" " * MIB + b"1]}"
    with pytest.raises(Refused, match=r"\] inputs: List should have at most 64 items"):
        kserve.from_json(kserve.Header, body, "send tensors in binary")


def test_arrays_do_not_keep_the_body() -> None:
    def body() -> bytes:
        sizes = {"image": 4 + 4 * MIB, "alpha": 4, "labels": 6}
        kinds = {"image": "BYTES", "alpha": "FP32", "labels": "BYTES"}
        inputs = [
            {"name": name, "shape": [1, 1], "datatype": kinds[name]}
            | {"parameters": {"binary_data_size": size}}
            for name, size in sizes.items()
        ]
        values = packed([bytes(4 * MIB)]) + bytes(4) + packed([b"ab"])
        return json.dumps({"inputs": inputs}).encode().ljust(1000) + values

    tracemalloc.start()
    request = kserve.read(body(), 1000, config("classify"))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert request.images == 1 and 4 * MIB < held < 5 * MIB


@pytest.mark.parametrize(("name", "ascii_only"), [("labels", True), ("examples", False)])
def test_the_memory_that_reading_takes_is_known_before(name: str, ascii_only: bool) -> None:
    values: list[list[Any]] = [
        ["x" * 2**18],
        ["x" * 2**18 + "\U0001f600"],
        ["\u732b" * 2**16] * 2,
        ["\U0001f600"] * 2**13,
        [{"a": {"b": {"c": [[[]]]}}}] * 2**10,
    ]
    for data in values:
        tensor = {"name": name, "shape": [1, len(data)], "datatype": "BYTES", "data": data}
        inputs = [tensor, {**IMAGE, "data": [1]}]
        body = json.dumps({"inputs": inputs}, ensure_ascii=ascii_only).encode()
        model = config("classify")
        tracemalloc.start()
        with pytest.raises(Refused, match=f"input (image|{name}) are not all texts"):
            kserve.read(body, len(body), model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < json_memory(body) < 10 * peak


# Turns


class Reading:
    """Takes the place of `kserve.read`: a text of "x" is read once `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.threads: list[str] = []
        self._read = kserve.read
        monkeypatch.setattr(kserve, "read", self)
        monkeypatch.setattr(app, "MIDDLE", MIDDLE)
        monkeypatch.setattr(app, "JSON_SHARE", 1)

    def __call__(self, body: bytes, *rest: Any) -> Inference:
        self.threads.append(threading.current_thread().name)
        if b"xx" in body:
            assert self.go.wait(20)
        return self._read(body, *rest)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    reading = Reading(monkeypatch)
    yield reading
    reading.go.set()


def test_the_event_loop_gets_its_turn_while_a_large_body_is_read(reading: Reading) -> None:
    with serving() as served, ThreadPoolExecutor(3) as pool:
        large = pool.submit(served.ask, INFER, text_of(MIDDLE + 1))
        until(lambda: len(reading.threads) == 1)
        second = pool.submit(served.ask, INFER, text_of(MIDDLE + 2))
        assert served.ask("/health/live")[0] == 200
        assert served.ask(INFER, TEXT)[0] == 200
        # A smaller one has another thread, and does not wait.
        middle = pool.submit(served.ask, INFER, text_of(SMALL + 1))
        until(lambda: len(reading.threads) == 3)
        assert not large.done() and not second.done() and not middle.done()
        reading.go.set()
        assert [caller.result()[0] for caller in (large, second, middle)] == [200] * 3
    large_, small, *others = reading.threads
    assert large_ == "large-bodies" and others == ["middle-bodies", "large-bodies"]
    assert not small.endswith("bodies")


def test_what_is_not_small_is_read_in_a_thread(reading: Reading) -> None:
    """In binary only images are few and large, while a body may have 131,072 texts."""
    reading.go.set()
    with serving() as served:
        head = json.dumps(text_of(2)).encode()
        served.ask(INFER, head.ljust(SMALL))
        served.ask(INFER, head.ljust(SMALL + 1))
        for texts in ([bytes(SMALL)], [b"text"] * FEW * 16):
            values = packed(texts)
            binary = {"shape": [len(texts), 1], "parameters": {"binary_data_size": len(values)}}
            head = json.dumps(
                {"inputs": [{"name": "text", "datatype": "BYTES", **binary}]}
            ).encode()
            length = {"Inference_Header_Content_Length": str(len(head))}
            served.ask(INFER, head + values, **length)
        # The header of a small image is read, too, to know how large its mask is.
        image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["abcd"]}
        labels = {"name": "labels", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
        served.ask(INFER.replace("embed_text", "segment"), {"inputs": [image, labels]})
    in_thread = [name == "middle-bodies" for name in reading.threads]
    assert in_thread == [False, True, False, True, True]


def test_a_large_request_for_embeddings_is_read_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[str] = []
    read = openai.read

    def reading(body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return read(body)

    monkeypatch.setattr(openai, "read", reading)
    with serving() as served:
        head = json.dumps({"model": "radapter", "input": "a"}).encode()
        served.ask(EMBEDDINGS, head.ljust(SMALL))
        served.ask(EMBEDDINGS, head.ljust(SMALL + 1))
    assert [name == "middle-bodies" for name in threads] == [False, True]


def body_bytes(served: Served) -> float:
    return float(served.metrics().partition("\nradapter_gateway_body_bytes ")[2].split()[0])


def test_the_budget_has_the_memory_of_reading_but_not_of_who_has_left(reading: Reading) -> None:
    with serving(max_body=1, max_memory=3.25) as served, ThreadPoolExecutor(1) as pool:
        size = MIDDLE + 1
        large = pool.submit(served.ask, INFER, text_of(size))
        until(lambda: len(reading.threads) == 1)
        alone = body_bytes(served)
        assert alone > 5 * size  # as it came, and while it is read
        # Another waits for its turn, and leaves.
        body = json.dumps(text_of(size)).encode()
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with served.connection(head.encode() + body):
            until(lambda: body_bytes(served) == alone + len(body))
        until(lambda: body_bytes(served) == alone)
        assert served.refusal(INFER, text_of(2 * size - 200)) == (429, "overloaded")
        reading.go.set()
        assert large.result()[0] == 200
        until(lambda: body_bytes(served) == 0)
    assert len(reading.threads) == 1


def test_the_budget_has_the_memory_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "JSON_SHARE", 1)
    labels = {"name": "labels", "shape": [1, 2**15], "datatype": "BYTES", "data": ["ab"] * 2**15}
    body = {"inputs": [IMAGE, labels]}
    path = "/v2/models/classify/infer"
    size = (8 + sys.getsizeof("ab")) * 2**15  # of the texts, and of pointers to them
    with serving(max_body=0.5, max_memory=2) as served, ThreadPoolExecutor(1) as pool:
        served.hold()
        first = pool.submit(served.ask, path, body)
        until(lambda: bool(served.upstream.asked))
        assert size < body_bytes(served) < size + 2000  # with an answer of five labels
        assert served.refusal(path, body) == (429, "overloaded")
        served.let_go()
        assert first.result()[0] == 200
        until(lambda: body_bytes(served) == 0)
    with serving(max_body=0.5, max_memory=0.5) as served:  # alone it is never too dear
        assert served.ask(path, body)[0] == 200


def test_a_caller_who_waits_too_long_for_a_turn_is_refused(reading: Reading) -> None:
    with serving(timeout=0.2) as served:
        assert served.refusal(INFER, text_of(MIDDLE + 1)) == (504, "timed_out")
        reading.go.set()


# After a refusal


class Failing(FakeUpstream):
    """Fails in a frame that holds its own error, as most do that raise one with a name."""

    failure: Callable[[], Exception]
    held: weakref.ref[threading.Event]

    async def infer(self, *_: Any) -> Any:
        held = threading.Event()  # stands for what a request holds
        self.held = weakref.ref(held)
        try:
            raise ValueError("as it came")
        except ValueError:
            error = self.failure()
            raise error from None


@pytest.fixture
def without_gc() -> Iterator[None]:
    """Nobody looks for cycles."""
    gc.disable()
    yield
    gc.enable()


def test_a_failure_lets_go_of_what_was_under_way(
    without_gc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "disabled", True)  # pytest keeps what is logged
    upstream = Failing()
    embeddings = {"model": "radapter", "input": "a"}
    with serving(lambda: upstream) as served:
        for path, body in ((INFER, TEXT), (EMBEDDINGS, embeddings)):
            for failure in (lambda: Refused(400, "no_labels", "none"), RuntimeError):
                upstream.failure = failure
                assert served.ask(path, body)[0] >= 400
                until(lambda: upstream.held() is None)
