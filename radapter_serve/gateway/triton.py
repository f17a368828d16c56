"""`Triton`: the upstream that asks tritonserver over gRPC, in the event loop of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from radapter_client import Reply
from radapter_client.grpc import CHANNEL, decode, encode
from radapter_serve.gateway.access import ConcurrencyLimit, Threads
from radapter_serve.gateway.upstream import (
    LOG,
    SHORT_TIMEOUT,
    SMALL,
    Entry,
    Inference,
    ServedModel,
    from_status,
)

RESOLVE_SECONDS = 30.0  # between DNS lookups, which find servers that were added
MAX_DRAIN_SECONDS = 3600.0  # for requests under way on a replaced channel
# Searches with a condition that Triton has at once, and those that wait for them here: a process of
# its `retrieve` runs one at a time, and would let the searches of others wait behind all of them.
CONDITIONS = 2
WAITING_CONDITIONS = 16
# Each address of the name is a server: take them in turn.
_CHANNEL = [*CHANNEL, ("grpc.lb_policy_name", "round_robin")]


class Triton:
    """An `Upstream` to Triton at an address such as 127.0.0.1:8001; needs a running event loop."""

    def __init__(self, address: str, now: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._now = now
        self._converting = Threads(1, "convert")
        self._conditions = ConcurrencyLimit(
            CONDITIONS, WAITING_CONDITIONS, "requests with a condition"
        )
        self._closing: set[asyncio.Future[None]] = set()
        self._open()

    def _open(self) -> None:
        self._opened = self._now()
        self._channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL)
        self._fresh_stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    @property
    def _stub(self) -> service_pb2_grpc.GRPCInferenceServiceStub:
        # A channel resolves its name when it is created and when a connection ends, but not when
        # servers are added, so it is replaced regularly. The new channel shares the open
        # connections.
        if self._now() - self._opened >= RESOLVE_SECONDS:
            closing = asyncio.ensure_future(self._channel.close(MAX_DRAIN_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._open()
        return self._fresh_stub

    async def infer(self, request: Inference, timeout: float, entry: Entry) -> Reply:
        encoded = partial(encode, request.model, request.version, request.inputs, request.outputs)
        message = encoded() if request.size <= SMALL else await self._converting.run(encoded)
        message.id = entry.id
        trace = entry.traceparent
        metadata = () if trace is None else (("traceparent", trace),)
        end = self._now() + timeout
        turn: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if "where" in request.inputs:  # the log counts its wait as Triton's time
            turn = self._conditions.slot(Entry(entry.id))
        async with turn:
            left = max(end - self._now(), 1e-3)
            answer = await self._ask(self._stub.ModelInfer, message, left, metadata)
        decoded = partial(decode, answer)
        return decoded() if answer.ByteSize() <= SMALL else await self._converting.run(decoded)

    async def config(self, model: str, version: str = "") -> ServedModel:
        request = service_pb2.ModelConfigRequest(name=model, version=version)
        config = (await self._ask(self._stub.ModelConfig, request)).config
        releases = {
            name: parameter.string_value
            for name, parameter in config.parameters.items()
            if name.partition(".")[0] == "release"
        }
        return ServedModel.of(model, releases)

    async def ready(self, model: str, version: str = "") -> bool:
        request = service_pb2.ModelReadyRequest(name=model, version=version)
        return bool((await self._ask(self._stub.ModelReady, request)).ready)

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
            details = error.details() or ""
            refused = from_status(error.code().name, details)
            if refused.status >= 500:
                LOG.warning("Triton: %s: %s", error.code().name, details.partition("\n")[0])
            raise refused from None
