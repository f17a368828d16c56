"""The way to Triton: what is sent and what comes back, where a name leads to several servers, and
to others after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from radapter_client import Reply
from radapter_client.grpc import decode
from radapter_serve.gateway.triton import (
    CONDITIONS,
    RESOLVE_SECONDS,
    WAITING_CONDITIONS,
    Triton,
)
from radapter_serve.gateway.upstream import Entry, Inference, Refused, from_status
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import config, packed

ASKED = Inference("classify", "", {})
ENTRY = Entry("own")


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers as a search does, with its own version, and remembers what came last."""

    message: service_pb2.ModelInferRequest
    metadata: dict[str, str]
    seconds: float  # that the request may take

    def __init__(self, version: int = 7, takes: float = 0.0, texts: Sequence[bytes] = ()) -> None:
        self._version = version
        self._texts = texts
        self._takes = takes

    async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
        self.message = request
        self.metadata = dict(context.invocation_metadata())
        self.seconds = context.time_remaining()
        if request.model_name.isupper():  # names a failure
            await context.abort(grpc.StatusCode[request.model_name], "why\nand more")
        await asyncio.sleep(self._takes)
        answer = service_pb2.ModelInferResponse(model_version=str(self._version))
        tensors: list[tuple[str, str, list[int], bytes]] = [
            ("id", "BYTES", [2], packed(["ü".encode(), b""])),
            ("score", "FP32", [1, 2], struct.pack("<ff", 0.5, 0.25)),
            ("mask", "UINT16", [2, 1], struct.pack("<HH", 1, 2)),
            ("thumbnail", "BYTES", [0], b""),
        ]
        if self._texts:
            tensors = [("labels", "BYTES", [len(self._texts)], packed(self._texts))]
        for name, datatype, shape, values in tensors:
            answer.outputs.add(name=name, datatype=datatype, shape=shape)
            answer.raw_output_contents.append(values)
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> service_pb2.ModelConfigResponse:
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=3)
        config.parameters["release"].string_value = json.dumps(release(2))
        for version in (1, 2):
            config.parameters[f"release.{version}"].string_value = json.dumps(release(version))
        config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "yes"
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelReady(self, request: Any, context: Any) -> service_pb2.ModelReadyResponse:
        return service_pb2.ModelReadyResponse(ready=(request.name, request.version) == ("a", "2"))


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    running = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    yield f"127.0.0.1:{port}"
    await running.stop(None)


def recorded(ask: Callable[[Triton], Any]) -> tuple[Any, Server]:
    """The answer to a call, and the server that was asked."""

    async def main() -> tuple[Any, Server]:
        server = Server()
        async with listening(server) as address:
            triton = Triton(address)
            try:
                return await ask(triton), server
            finally:
                await triton.close()

    return asyncio.run(main())


def test_arrays_are_sent_and_arrays_come_back() -> None:
    masks = np.arange(24, dtype=np.uint8).reshape(4, 3, 2).T  # in no order of C
    inputs = {
        "image": np.array([b"\xff\0"], object),
        "labels": np.array(["ü\0", b"b"], object),
        "refine": np.array([-1], np.int32),
        "proposals": masks,
    }
    request = Inference("segment", "7", inputs, ("mask", "label"), "of the caller")
    followed = Entry("own", traceparent="00-trace-01")
    reply, recorder = recorded(lambda triton: triton.infer(request, 30, followed))
    assert isinstance(reply, Reply) and reply.version == 7
    arrays = {name: (str(array.dtype), array.tolist()) for name, array in reply.outputs.items()}
    assert arrays == {
        "id": ("object", ["ü".encode(), b""]),
        "score": ("float32", [[0.5, 0.25]]),
        "mask": ("uint16", [[1], [2]]),
        "thumbnail": ("object", []),
    }
    message = recorder.message
    assert (message.model_name, message.model_version, message.id) == ("segment", "7", "own")
    assert [output.name for output in message.outputs] == ["mask", "label"]
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in message.inputs] == [
        ("image", "BYTES", [1]),
        ("labels", "BYTES", [2]),
        ("refine", "INT32", [1]),
        ("proposals", "UINT8", [2, 3, 4]),
    ]
    assert list(message.raw_input_contents) == [
        packed([b"\xff\0"]),
        packed(["ü\0".encode(), b"b"]),
        struct.pack("<i", -1),
        masks.tobytes(),
    ]
    assert recorder.metadata["traceparent"] == "00-trace-01"
    assert 20 < recorder.seconds < 31  # gRPC rounds the time that is left
    _, recorder = recorded(lambda triton: triton.infer(ASKED, 10, ENTRY))
    assert "traceparent" not in recorder.metadata


def test_searches_with_a_condition_take_turns_and_others_pass_them() -> None:
    condition = Inference("retrieve", "", {"where": np.array([b"id = 'a'"], object)})
    plain = Inference("retrieve", "", {})

    async def main() -> list[str]:
        outcomes: list[str] = []

        async def ask(triton: Triton, request: Inference, name: str) -> None:
            try:
                await triton.infer(request, 30, ENTRY)
            except Refused as error:
                name = error.code
            outcomes.append(name)

        async with listening(Server(takes=0.5)) as address:
            triton = Triton(address)
            try:
                count = CONDITIONS + WAITING_CONDITIONS + 1
                asked = [ask(triton, condition, "condition") for _ in range(count)]
                await asyncio.gather(*asked, ask(triton, plain, "plain"))
            finally:
                await triton.close()
        return outcomes

    outcomes = asyncio.run(main())
    assert outcomes[0] == "overloaded"
    assert "plain" in outcomes[: CONDITIONS + 2]
    assert outcomes.count("condition") == CONDITIONS + WAITING_CONDITIONS


@pytest.mark.parametrize(("count", "thread"), [(8, "MainThread"), (10_000, "convert")])
def test_a_large_answer_is_decoded_in_a_thread(
    monkeypatch: pytest.MonkeyPatch, count: int, thread: str
) -> None:
    threads = []

    def noted(message: Any) -> Reply:
        threads.append(threading.current_thread().name)
        return decode(message)

    monkeypatch.setattr("radapter_serve.gateway.triton.decode", noted)
    texts = [b"a label of ten"] * count

    async def run() -> Reply:
        async with listening(Server(texts=texts)) as address:
            triton = Triton(address)
            try:
                return await triton.infer(ASKED, 5, ENTRY)
            finally:
                await triton.close()

    reply = asyncio.run(run())
    assert reply.outputs["labels"].tolist() == texts
    assert threads == [thread]


def test_what_triton_says_of_a_model() -> None:
    model, _ = recorded(lambda triton: triton.config("embed_text", "2"))
    assert model == config("embed_text", release(1), release(2))
    assert recorded(lambda triton: triton.ready("a", "2"))[0]
    assert not recorded(lambda triton: triton.ready("a"))[0]


async def asked(triton: Triton) -> int:
    return (await triton.infer(ASKED, 10, ENTRY)).version


def test_servers_are_looked_up_again_and_requests_under_way_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual: Callable[..., Any] = grpc.aio.insecure_channel
    addresses: list[str] = []
    # The name leads to the first server when it is looked up first, and to the second from then on.
    monkeypatch.setattr(
        grpc.aio, "insecure_channel", lambda _, options: usual(addresses.pop(0), options=options)
    )

    async def main() -> list[int]:
        async with listening(Server(1, takes=0.3)) as first, listening(Server(2)) as second:
            addresses.extend([first, second])
            clock = FakeClock()
            triton = Triton("name:8001", clock.monotonic)
            clock.now += RESOLVE_SECONDS - 0.01
            slow = asyncio.ensure_future(asked(triton))
            await asyncio.sleep(0.1)
            clock.now += 0.01
            late = await asked(triton)
            versions = [await slow, late, await asked(triton)]
            await triton.close()
            return versions

    assert asyncio.run(main()) == [1, 2, 2]


def test_failures_of_triton_are_logged_and_those_of_callers_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for status in ("INTERNAL", "INVALID_ARGUMENT"):
        with pytest.raises(Refused):
            recorded(
                partial(Triton.infer, request=Inference(status, "", {}), timeout=10, entry=ENTRY)
            )
    assert [line for line in caplog.messages if "Triton" in line] == ["Triton: INTERNAL: why"]


@pytest.mark.parametrize(
    ("status", "text", "http_status", "code"),
    [
        ("INVALID_ARGUMENT", "[invalid_image] 5 bytes are not an image", 400, "invalid_image"),
        ("INTERNAL", "x, message: [encoder_failed] it did /srv/m.py", 500, "encoder_failed"),
        ("INTERNAL", "Stub died at /tmp/x\n\nAt:\n /a.py(3)", 500, "internal_error"),
        ("INVALID_ARGUMENT", "[request id: <id_unknown>] bad /x", 400, "invalid_argument"),
        ("NOT_FOUND", "unknown model: 'x' has no available versions", 503, "restarting"),
        ("NOT_FOUND", "model 'x' version 7 is not found", 404, "unknown_model"),
        ("UNAVAILABLE", "ipv4:127.0.0.1:8001: refused", 503, "server_unavailable"),
        ("UNAVAILABLE", "Exceeds maximum queue size", 429, "overloaded"),
        ("INTERNAL", "message: [timed_out] this took too long", 504, "timed_out"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", 504, "timed_out"),
    ],
)
def test_errors_of_triton(status: str, text: str, http_status: int, code: str) -> None:
    error = from_status(status, text)
    assert (error.status, error.code) == (http_status, code)
    assert "\n" not in str(error) and "/" not in str(error) and error.message
