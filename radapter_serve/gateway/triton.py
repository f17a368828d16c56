"""The way to Triton: gRPC, in the event loop of the gateway."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from radapter_client import Reply
from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.gateway.answers import pack
from radapter_serve.gateway.errors import from_status
from radapter_serve.gateway.models import Model
from radapter_serve.gateway.requests import Inference
from radapter_serve.gateway.upstream import LOG, SHORT_TIMEOUT, Followed
from radapter_serve.release.tensors import NUMPY
from radapter_serve.tasks.table import TASKS

# After so many a name's servers are looked up again: there may be more of them.
RESOLVE_SECONDS = 30.0
MAX_DRAIN_SECONDS = 3600.0  # that a request may go on with the servers of before
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's own waits up to two minutes before it looks again for a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # An http_proxy of the environment is not for the model server.
    ("grpc.enable_http_proxy", 0),
    # Where a name has several addresses, each is a server of its own.
    ("grpc.lb_policy_name", "round_robin"),
]


class Triton:
    """An `Upstream`, to be made in a running event loop.

    Args:
        address: such as 127.0.0.1:8001.
        clock: tells the time.
    """

    def __init__(self, address: str, clock: Clock = SYSTEM) -> None:
        self._address = address
        self._clock = clock
        self._closing: set[asyncio.Future[None]] = set()
        self._open()

    def _open(self) -> None:
        self._opened = self._clock.monotonic()
        self._channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL)
        self._own_stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @property
    def _stub(self) -> service_pb2_grpc.GRPCInferenceServiceStub:
        # A channel looks a name up when it is made and when a connection ends, not when servers are
        # added. A new channel shares the connections that there are.
        if self._clock.monotonic() - self._opened >= RESOLVE_SECONDS:
            closing = asyncio.ensure_future(self._channel.close(MAX_DRAIN_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._open()
        return self._own_stub

    async def infer(
        self, asked: Inference, timeout: float, followed: Followed | None = None
    ) -> Reply:
        message = service_pb2.ModelInferRequest(model_name=asked.model, model_version=asked.version)
        metadata: tuple[tuple[str, str], ...] = ()
        if followed is not None:
            message.id = followed.id
            if followed.traceparent is not None:
                metadata = (("traceparent", followed.traceparent),)
        for name, array in asked.inputs.items():
            datatype = TASKS[asked.model].inputs[name].datatype
            message.inputs.add(name=name, datatype=datatype, shape=array.shape)
            message.raw_input_contents.append(pack(array))
        for name in asked.outputs:
            message.outputs.add(name=name)
        answer = await self._ask(self._stub.ModelInfer, message, timeout, metadata)
        pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
        outputs = {output.name: _array(output, values) for output, values in pairs}
        return Reply(int(answer.model_version), outputs)

    async def config(self, model: str, version: str = "") -> Model:
        request = service_pb2.ModelConfigRequest(name=model, version=version)
        config = (await self._ask(self._stub.ModelConfig, request)).config
        parameters = {name: one.string_value for name, one in config.parameters.items()}
        named = (name for name in parameters if name.partition(".")[0] == "release")
        return Model.of(model, {name: parameters[name] for name in named})

    async def versions(self, model: str) -> list[str]:
        return list(
            (
                await self._ask(
                    self._stub.ModelMetadata, service_pb2.ModelMetadataRequest(name=model)
                )
            ).versions
        )

    async def ready(self, model: str, version: str = "") -> bool:
        request = service_pb2.ModelReadyRequest(name=model, version=version)
        return bool((await self._ask(self._stub.ModelReady, request)).ready)

    async def outdated_indexes(self) -> Mapping[str, bool]:
        return {}  # Triton's own metrics say it

    async def close(self) -> None:
        for closing in self._closing:
            closing.cancel()
        await self._channel.close()

    @staticmethod
    async def _ask(
        method: Any,
        message: Any,
        timeout: float = SHORT_TIMEOUT,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        try:
            return await method(message, timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            refused = from_status(error.code().name, error.details() or "")
            if refused.status >= 500:
                LOG.warning(
                    "Triton: %s: %s", error.code().name, (error.details() or "").partition("\n")[0]
                )
            raise refused from None


def _array(output: service_pb2.ModelInferResponse.InferOutputTensor, values: bytes) -> NDArray[Any]:
    if output.datatype != "BYTES":
        return np.frombuffer(values, NUMPY[output.datatype]).reshape(output.shape)
    items = []
    offset = 0
    while offset < len(values):
        (length,) = struct.unpack_from("<I", values, offset)
        offset += 4 + length
        items.append(values[offset - length : offset])
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(output.shape)
