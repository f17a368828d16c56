"""What the client tries again, how long it waits, and the key that it sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

import radapter_client
from radapter_client import Client
from radapter_client._client import Tries
from radapter_serve.cli import query
from tests.client.test_client_wire import attempt
from tests.helpers.stand_ins import http_server

GOOD = {
    "model_version": "1",
    "outputs": [{"name": "text_embeds", "datatype": "FP32", "shape": [1, 1], "data": [7]}],
}
Step = (
    tuple[int, dict[str, str]] | None
)  # status and headers of an answer; None breaks the connection


@contextmanager
def http_steps(*steps: Step, port: int = 0) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers by these steps, one a request, and well after the last; its URL, and
    what it was sent.
    """
    first = [
        step
        and (
            step[0],
            json.dumps({"error": step[1].get("error", "[overloaded] busy")}).encode(),
            step[1],
        )
        for step in steps
    ]
    with http_server(200, json.dumps(GOOD).encode(), first=first, port=port) as found:
        yield found


@contextmanager
def grpc_steps(*steps: tuple[grpc.StatusCode, str]) -> Iterator[tuple[str, list[Any]]]:
    """The same over gRPC."""
    from concurrent.futures import ThreadPoolExecutor

    left = list(steps)
    seen: list[Any] = []

    def infer(request: Any, context: grpc.ServicerContext) -> service_pb2.ModelInferResponse:
        seen.append(dict(context.invocation_metadata()))
        if left:
            context.abort(*left.pop(0))
        answer = service_pb2.ModelInferResponse(model_version="1")
        answer.outputs.add(name="text_embeds", datatype="FP32", shape=[1, 1])
        answer.raw_output_contents.append(np.float32(7).tobytes())
        return answer

    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        service_pb2.ModelInferRequest.FromString,
        service_pb2.ModelInferResponse.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler(
        "inference.GRPCInferenceService", {"ModelInfer": handler}
    )
    server = grpc.server(ThreadPoolExecutor(1), handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", seen
    finally:
        server.stop(None).wait()


def embed(kind: type, url: str, **options: Any) -> Any:
    """The embedding that a client of either kind gets, or its error."""
    answer = attempt(kind, url, lambda client: client.embed_texts(["x"]), **options)
    return answer if isinstance(answer, Exception) else answer.tolist()


BUSY: Step = (429, {})
STOPS: Step = (503, {"error": "[server_stopping] it stops"})


@pytest.mark.parametrize("steps", [[], [BUSY], [None, STOPS], [(502, {}), None]])
def test_what_nobody_answered_is_asked_again_over_http(kind: type, steps: list[Step]) -> None:
    with http_steps(*steps) as (url, seen):
        assert embed(kind, url) == [[7]]
    assert len(seen) == len(steps) + 1


def test_no_more_often_than_allowed(kind: type) -> None:
    for retries in (0, 1):
        with http_steps(BUSY, BUSY, BUSY) as (url, seen):
            found = embed(kind, url, retries=retries)
            assert type(found) is radapter_client.ServerUnavailable and found.code == "overloaded"
            assert len(seen) == retries + 1


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 500, 504])
def test_what_is_wrong_or_late_is_not_asked_again(kind: type, status: int) -> None:
    with http_steps((status, {"error": "[any] no"})) as (url, seen):
        assert isinstance(embed(kind, url), radapter_client.RAdapterClientError)
    assert len(seen) == 1


@pytest.mark.parametrize("wait", ["3600", "nonsense", "-5"])
def test_a_wait_beyond_the_time_out_is_not_begun(kind: type, wait: str) -> None:
    with http_steps((429, {"Retry-After": wait})) as (url, seen):
        found = embed(kind, url, timeout=5)
        if wait == "3600":
            assert type(found) is radapter_client.ServerUnavailable and found.retry_after == 3600
        else:
            assert found == [[7]]
    assert len(seen) == 1 + (wait != "3600")


def test_over_grpc(kind: type) -> None:
    away = grpc.StatusCode.UNAVAILABLE
    with grpc_steps((away, "[server_stopping] x"), (away, "y")) as (url, seen):
        assert embed(kind, url, api_key="secret") == [[7]]
    assert len(seen) == 3 and seen[-1]["authorization"] == "Bearer secret"
    with grpc_steps((grpc.StatusCode.DEADLINE_EXCEEDED, "late")) as (url, seen):
        assert type(embed(kind, url)) is radapter_client.Timeout
    assert len(seen) == 1


def test_waits_grow_and_end() -> None:
    tries = Tries(50, 1000)
    error = radapter_client.ServerUnavailable("x")
    waits = []
    assert tries.seconds == 1000
    for _ in range(10):
        waits.append(tries.pause(error))
    for wait, most in zip(waits, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5], strict=True):
        assert most / 2 <= wait <= most
    assert 994 < tries.seconds < 1000
    with pytest.raises(radapter_client.ServerUnavailable):
        Tries(50, 0.01).pause(error)


def test_whether_it_is_ready_is_asked_once() -> None:
    with http_steps(*[STOPS] * 20) as (url, seen):
        with Client(url) as client:
            assert not client.is_ready()
        assert (
            len(seen) <= 5
        )  # of five tasks; what waits for a thread after the first failure is not sent


# Keys


@pytest.mark.parametrize("key", ["", "two words", "line\n", "ü", 5])
def test_keys_that_are_none(key: Any) -> None:
    with pytest.raises(radapter_client.InvalidRequest, match="api_key is no key") as caught:
        Client(api_key=key)
    assert not key or str(key) not in str(caught.value).split()


def test_a_key_in_the_clear_is_warned_of() -> None:
    for url in ("http://example.com", "grpc://192.0.2.1:8001"):
        with pytest.warns(
            UserWarning, match=r"travels to \w+://.* in the clear; use (http|grpc)s:"
        ):
            Client(url, api_key="secret").close()
    for url in (
        "http://localhost:1",
        "http://[::1]:1",
        "grpc://127.0.0.1:1",
        "https://example.com",
    ):
        Client(url, api_key="secret").close()


def test_the_command_takes_the_key_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RADAPTER_API_KEY", "secret")
    call = ["embed-text", "x", "--out", str(tmp_path / "a.npy"), "--url"]
    with http_steps() as (url, seen):
        assert query.main([*call, url]) == 0
    assert seen[0][2]["Authorization"] == "Bearer secret"
    assert "note" not in capsys.readouterr().err
    query.main([*call, "http://127.0.0.1.invalid:1"])
    assert "note: the API key travels to http://127.0.0.1.inva" in capsys.readouterr().err
    with http_steps((401, {"error": "[unauthorized] send a key"})) as (url, _):
        assert query.main([*call, url]) == 2
    assert "RADAPTER_API_KEY" in capsys.readouterr().err
