"""The way to Triton: what is sent and what comes back, where a name leads to several servers, and
to others after a while.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from radapter_client import Reply
from radapter_serve.gateway.triton import RESOLVE_SECONDS, Triton
from radapter_serve.gateway.upstream import Entry, Inference, Refused, from_status
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_server import release
from tests.helpers.fake_upstream import config, packed

ASKED = Inference("classify", "", {})


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers every inference with its own version."""

    def __init__(self, version: int, seconds: float = 0.0) -> None:
        self._version = version
        self._seconds = seconds

    async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
        await asyncio.sleep(self._seconds)
        return service_pb2.ModelInferResponse(model_version=str(self._version))


async def listening(server: Server) -> tuple[grpc.aio.Server, str]:
    running = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    return running, f"127.0.0.1:{port}"


async def asked(triton: Triton) -> int:
    return (await triton.infer(ASKED, 10)).version


class Recorder(Server):
    """Remembers what came last, and answers as a search does."""

    message: service_pb2.ModelInferRequest
    metadata: dict[str, str]
    seconds: float  # that the request may take

    async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
        self.message = request
        self.metadata = dict(context.invocation_metadata())
        self.seconds = context.time_remaining()
        answer = service_pb2.ModelInferResponse(model_name="retrieve", model_version="7")
        tensors: list[tuple[str, str, list[int], bytes]] = [
            ("id", "BYTES", [2], packed(["ü".encode(), b""])),
            ("score", "FP32", [1, 2], struct.pack("<ff", 0.5, 0.25)),
            ("mask", "UINT16", [2, 1], struct.pack("<HH", 1, 2)),
            ("thumbnail", "BYTES", [0], b""),
        ]
        for name, datatype, shape, values in tensors:
            answer.outputs.add(name=name, datatype=datatype, shape=shape)
            answer.raw_output_contents.append(values)
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> service_pb2.ModelConfigResponse:
        found = model_config_pb2.ModelConfig(name=request.name, max_batch_size=3)
        found.parameters["release"].string_value = json.dumps(release(2))
        for version in (1, 2):
            found.parameters[f"release.{version}"].string_value = json.dumps(release(version))
        found.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "yes"
        return service_pb2.ModelConfigResponse(config=found)

    async def ModelReady(self, request: Any, context: Any) -> service_pb2.ModelReadyResponse:
        return service_pb2.ModelReadyResponse(ready=(request.name, request.version) == ("a", "2"))


def recorded(ask: Callable[[Triton], Any]) -> tuple[Any, Recorder]:
    """What a way to Triton gives, and who was asked."""

    async def main() -> tuple[Any, Recorder]:
        recorder = Recorder(7)
        server, address = await listening(recorder)
        triton = Triton(address)
        found = await ask(triton)
        await triton.close()
        await server.stop(None)
        return found, recorder

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
    found = {name: (str(one.dtype), one.tolist()) for name, one in reply.outputs.items()}
    assert found == {
        "id": ("object", ["ü".encode(), b""]),
        "score": ("float32", [[0.5, 0.25]]),
        "mask": ("uint16", [[1], [2]]),
        "thumbnail": ("object", []),
    }
    message = recorder.message
    assert (message.model_name, message.model_version, message.id) == ("segment", "7", "own")
    assert [output.name for output in message.outputs] == ["mask", "label"]
    assert [(one.name, one.datatype, list(one.shape)) for one in message.inputs] == [
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
    assert 20 < recorder.seconds <= 30
    _, recorder = recorded(lambda triton: triton.infer(ASKED, 10))
    assert not recorder.message.id and "traceparent" not in recorder.metadata


def test_what_triton_says_of_a_model() -> None:
    model, _ = recorded(lambda triton: triton.config("embed_text", "2"))
    assert model == config("embed_text", release(1), release(2))
    assert recorded(lambda triton: triton.ready("a", "2"))[0]
    assert not recorded(lambda triton: triton.ready("a"))[0]


def test_requests_are_spread_over_all_servers_of_a_name() -> None:
    async def main() -> Counter[int]:
        first = await listening(Server(1))
        second = await listening(Server(2))
        triton = Triton(f"ipv4:{first[1]},{second[1]}")
        names = Counter([await asked(triton) for _ in range(20)])
        await triton.close()
        await asyncio.gather(first[0].stop(None), second[0].stop(None))
        return names

    names = asyncio.run(main())
    assert set(names) == {1, 2}
    assert min(names.values()) > 5


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
        first = await listening(Server(1, seconds=0.5))
        second = await listening(Server(2))
        addresses.extend([first[1], second[1]])
        clock = FakeClock()
        triton = Triton("name:8001", clock.monotonic)
        clock.now += RESOLVE_SECONDS - 0.01
        slow = asyncio.ensure_future(asked(triton))
        await asyncio.sleep(0.1)
        clock.now += 0.01
        late = await asked(triton)
        names = [await slow, late, await asked(triton)]
        await triton.close()
        await asyncio.gather(first[0].stop(None), second[0].stop(None))
        return names

    assert asyncio.run(main()) == [1, 2, 2]


def test_a_failure_of_triton_is_logged_and_what_a_caller_did_wrong_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Server):
        async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
            await context.abort(grpc.StatusCode[request.model_name], "why\nand more")
            raise AssertionError

    async def refused(status: str) -> int:
        server, address = await listening(Failing(1))
        triton = Triton(address)
        with pytest.raises(Refused) as error:
            await triton.infer(Inference(status, "", {}), 10)
        await triton.close()
        await server.stop(None)
        return error.value.status

    assert asyncio.run(refused("INTERNAL")) == 500
    assert caplog.messages == ["Triton: INTERNAL: why"]
    assert asyncio.run(refused("INVALID_ARGUMENT")) == 400
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("status", "text", "http_status", "code"),
    [
        ("INVALID_ARGUMENT", "[invalid_image] 5 bytes are not an image", 400, "invalid_image"),
        ("INTERNAL", "x, message: [encoder_failed] it did /srv/m.py", 500, "encoder_failed"),
        ("INTERNAL", "Stub died at /tmp/x\n\nAt:\n /a.py(3)", 500, "internal_error"),
        ("INVALID_ARGUMENT", "[request id: <id_unknown>] bad /x", 400, "invalid_argument"),
        ("NOT_FOUND", "unknown model: 'x' has no available versions", 503, "restarting"),
        ("INTERNAL", "Model 'image_encoder' is not ready.", 503, "restarting"),
        ("NOT_FOUND", "model 'x' version 7 is not found", 404, "unknown_model"),
        ("UNAVAILABLE", "ipv4:127.0.0.1:8001: refused", 503, "server_unavailable"),
        ("UNAVAILABLE", "[server_stopping] it stops", 503, "server_stopping"),
        ("UNAVAILABLE", "Exceeds maximum queue size", 429, "overloaded"),
        ("INTERNAL", "Failed to increase the shared memory pool size", 429, "overloaded"),
        ("INTERNAL", "message: [timed_out] this took too long", 504, "timed_out"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", 504, "timed_out"),
        ("UNKNOWN", "x", 500, "internal_error"),
    ],
)
def test_errors_of_triton(status: str, text: str, http_status: int, code: str) -> None:
    error = from_status(status, text)
    assert (error.status, error.code) == (http_status, code)
    assert "\n" not in str(error) and "/" not in str(error) and error.message
