"""The way to Triton: gRPC, in the event loop of the gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from radapter_serve.clock import SYSTEM, Clock
from radapter_serve.engine.steps import Step
from radapter_serve.gateway.errors import from_triton

LOG = logging.getLogger("radapter-gateway")
SHORT_TIMEOUT = 10.0  # seconds for what computes nothing
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


@dataclass
class Followed:
    """What follows one request.

    Attributes:
        traceparent: of W3C's Trace Context, for the server that computes; None where no spans are
            sent.
        steps: that an engine took for it.
    """

    traceparent: str | None = None
    steps: list[Step] = field(default_factory=list)


class Upstream(Protocol):
    """What the gateway asks; a task that is cancelled while it waits cancels the request in Triton
    too.
    """

    async def infer(
        self,
        message: service_pb2.ModelInferRequest,
        timeout: float,
        followed: Followed | None = None,
    ) -> service_pb2.ModelInferResponse:
        """The answer of a model, within `timeout` seconds; all methods raise nothing but
        `Refused`.
        """

    async def config(self, model: str, version: str = "") -> model_config_pb2.ModelConfig:
        """A model's configuration."""

    async def versions(self, model: str) -> list[str]:
        """The versions of a model."""

    async def ready(self, model: str, version: str = "") -> bool:
        """Whether Triton calls a model ready."""

    async def outdated_indexes(self) -> Mapping[str, bool]:
        """Whether another release than the newest that is served made the indexes, by the names of
        these; of what has no metrics of its own.
        """

    async def close(self) -> None:
        """Ends the connection."""


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
        self,
        message: service_pb2.ModelInferRequest,
        timeout: float,
        followed: Followed | None = None,
    ) -> service_pb2.ModelInferResponse:
        metadata: tuple[tuple[str, str], ...] = ()
        if followed is not None and followed.traceparent is not None:
            metadata = (("traceparent", followed.traceparent),)
        return await self._ask(self._stub.ModelInfer, message, timeout, metadata)

    async def config(self, model: str, version: str = "") -> model_config_pb2.ModelConfig:
        request = service_pb2.ModelConfigRequest(name=model, version=version)
        return (await self._ask(self._stub.ModelConfig, request)).config

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
            refused = from_triton(error.code(), error.details() or "")
            if refused.status >= 500:
                LOG.warning(
                    "Triton: %s: %s", error.code().name, (error.details() or "").partition("\n")[0]
                )
            raise refused from None
