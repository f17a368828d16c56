"""What callers see of a network that is slow, silent or cut, and of others who only hold
connections open.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from radapter_client import Client
from tests.faults.conftest import RunningGateway, RunningProcess, outcome
from tests.helpers.bad_network import BadNetwork, bad_network
from tests.helpers.fake_server import FakeServer

pytestmark = pytest.mark.triton

WAYS = ["grpc", "http", "gateway", "engine"]


@pytest.fixture(params=WAYS)
def network(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[str, BadNetwork]]:
    """A URL of each way in, through a network that can be bad."""
    if request.param in ("gateway", "engine"):
        url = request.getfixturevalue(request.param).url
    else:
        url = request.getfixturevalue("running").urls[request.param]
    with bad_network(int(url.rpartition(":")[2])) as network:
        yield network.url(url), network


def test_a_network_that_is_slow_silent_and_cut(network: tuple[str, BadNetwork]) -> None:
    """Slow: answers. Silent: Timeout in the caller's own time. Cut in mid-call: asked again. Then
    as before.
    """
    url, net = network
    with Client(url) as client:
        assert outcome(partial(client.classify, b"x", ["a"])) == "an answer"
        net.delay = 0.3
        assert outcome(partial(client.classify, b"x", ["a"], timeout=30.0)) == "an answer"
        net.delay = 0.0
        net.silent = True
        began = time.monotonic()
        assert outcome(partial(client.classify, b"x", ["a"], timeout=1.0)) == "Timeout None"
        assert time.monotonic() - began < 10
        net.silent = False
        net.cut()
        assert outcome(partial(client.classify, b"x", ["a"], timeout=30.0)) == "an answer"
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(
                outcome, partial(client.classify, b'{"sleep": 1}', ["a"], timeout=30.0)
            )
            time.sleep(0.5)
            net.cut()
            assert call.result(40) == "an answer"


def test_a_silent_network_between_the_gateway_and_triton(running: FakeServer) -> None:
    """A gateway that hears nothing of Triton answers with a time-out in time, and works when Triton
    is heard again.
    """
    address = running.grpc_url.removeprefix("grpc://")
    with bad_network(int(address.rpartition(":")[2])) as net:
        gateway = RunningGateway(f"127.0.0.1:{net.port}")
        try:
            with Client(gateway.url) as client:
                assert outcome(partial(client.classify, b"x", ["a"])) == "an answer"
                net.silent = True
                assert outcome(partial(client.classify, b"x", ["a"], timeout=1.0)).startswith(
                    "Timeout"
                )
                net.silent = False
                net.cut()
                assert outcome(partial(client.classify, b"x", ["a"], timeout=30.0)) == "an answer"
        finally:
            gateway.end()


HALF = (
    b"POST /v2/models/classify/infer HTTP/1.1\r\nHost: x\r\nContent-Type:"
    b" application/json\r\nContent-Length: 99\r\n"
)


@contextlib.contextmanager
def held_open(port: int) -> Iterator[None]:
    """1,000 connections that say nothing, 100 with half of the headers and 100 with half of a
    body.
    """
    need_files(1_500)
    with contextlib.ExitStack() as stack:
        for number in range(1_200):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            if number >= 1_000:
                with contextlib.suppress(ConnectionError):  # a gateway may refuse so many
                    one.sendall(HALF + (b"\r\n{" if number % 2 else b""))
        yield


def test_a_thousand_idle_and_two_hundred_half_open_connections(front: RunningProcess) -> None:
    """1,000 silent connections and 200 with half a request do not keep a good call from its
    answer.
    """
    with held_open(front.port), Client(front.url, timeout=20, retries=0) as client:
        for _ in range(20):
            assert outcome(partial(client.classify, b"x", ["a"])) == "an answer"


@pytest.mark.slow
def test_more_silent_connections_than_a_gateway_takes(running: FakeServer) -> None:
    """Above --max-connections a new caller gets the place of one that says nothing."""
    gateway = RunningGateway(running.grpc_url.removeprefix("grpc://"), max_connections=512)
    try:
        with held_open(gateway.port), Client(gateway.url, timeout=50, retries=0) as client:
            assert outcome(partial(client.classify, b"x", ["a"])) == "an answer"
    finally:
        gateway.end()


def need_files(count: int) -> None:
    """Let this process open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this process may open {hard} files at most, and the test needs {count}")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
