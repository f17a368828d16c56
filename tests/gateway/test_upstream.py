"""The way to Triton where a name leads to several servers, and to others after a while."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from radapter_serve.gateway import upstream
from radapter_serve.gateway.errors import Refused
from radapter_serve.gateway.upstream import RESOLVE_SECONDS
from tests.helpers.fake_clock import FakeClock


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers every inference with its own name, and counts them."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        self._name = name
        self._seconds = seconds

    async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
        await asyncio.sleep(self._seconds)
        return service_pb2.ModelInferResponse(model_name=self._name)


async def started(name: str, seconds: float = 0.0) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(name, seconds), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def asked(triton: upstream.Triton) -> str:
    return str(
        (await triton.infer(service_pb2.ModelInferRequest(model_name="classify"), 10)).model_name
    )


def test_requests_are_spread_over_all_servers_of_a_name() -> None:
    async def main() -> Counter[str]:
        first = await started("first")
        second = await started("second")
        triton = upstream.Triton(f"ipv4:{first[1]},{second[1]}")
        names = Counter([await asked(triton) for _ in range(20)])
        await triton.close()
        await asyncio.gather(first[0].stop(None), second[0].stop(None))
        return names

    names = asyncio.run(main())
    assert set(names) == {"first", "second"}
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

    async def main() -> list[str]:
        first = await started("first", seconds=0.5)
        second = await started("second")
        addresses.extend([first[1], second[1]])
        clock = FakeClock()
        triton = upstream.Triton("name:8001", clock)
        clock.now += RESOLVE_SECONDS - 0.01
        slow = asyncio.ensure_future(asked(triton))
        await asyncio.sleep(0.1)
        clock.now += 0.01
        late = await asked(triton)
        names = [await slow, late, await asked(triton)]
        await triton.close()
        await asyncio.gather(first[0].stop(None), second[0].stop(None))
        return names

    assert asyncio.run(main()) == ["first", "second", "second"]


def test_a_failure_of_triton_is_logged_and_what_a_caller_did_wrong_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Server):
        async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
            await context.abort(grpc.StatusCode[request.model_name], "why\nand more")
            raise AssertionError

    async def refused(status: str) -> int:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Failing(""), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        triton = upstream.Triton(f"127.0.0.1:{port}")
        with pytest.raises(Refused) as error:
            await triton.infer(service_pb2.ModelInferRequest(model_name=status), 10)
        await triton.close()
        await server.stop(None)
        return error.value.status

    assert asyncio.run(refused("INTERNAL")) == 500
    assert caplog.messages == ["Triton: INTERNAL: why"]
    assert asyncio.run(refused("INVALID_ARGUMENT")) == 400
    assert len(caplog.messages) == 1
