"""What callers see of a network that is slow, silent or cut, and of others who only hold
connections open.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from radapter_client import Client
from tests.faults.conftest import RunningGateway, outcome
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
