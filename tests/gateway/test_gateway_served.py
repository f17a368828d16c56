"""The gateway in front of a real tritonserver: the same answers as without it, and Triton hears who
has left.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from radapter_client import Client
from tests.helpers.fake_server import FakeServer
from tests.helpers.gateway import gateway
from tests.helpers.small_release import png

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def url(fake_server: FakeServer) -> Iterator[str]:
    with gateway(fake_server) as url:
        yield url


PNG = png(1, 7, 5)
PROPOSALS = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(2, 5, 7)
SCORES = np.full((2, 2), 0.1, np.float32)


def calls(client: Any) -> list[Any]:
    images = [b"one", PNG, b"three"]
    return [
        partial(client.classify, images, ["a", "ü", "c"]),
        partial(client.embed_images, images),
        partial(client.embed_texts, ["a", "ü"]),
        partial(client.search, "ü", index="photos", top_k=3, thumbnails=True),
        partial(client.segment, [PNG, PNG], ["a", "b"], threshold=0.5),
        partial(client.segment, PNG, ["a", "ü"], proposals=PROPOSALS, proposal_scores=SCORES),
        client.release,
        client.releases,
        client.is_ready,
    ]


def plain(found: Any) -> Any:
    """Something that can be compared."""
    if isinstance(found, list):
        return [plain(one) for one in found]
    if isinstance(found, np.ndarray):
        return found.tolist()
    if hasattr(found, "__dict__"):
        return {key: plain(value) for key, value in vars(found).items()}
    return found


def test_a_client_gets_the_same_answers(fake_server: FakeServer, url: str) -> None:
    answers = []
    for where in (fake_server.grpc_url, url):
        with Client(where, batch_size=2) as client:
            answers.append([plain(call()) for call in calls(client)])
    assert answers[0][-1] is True
    assert answers[0] == answers[1]
    assert urllib3.request("GET", f"{url}/health/ready").status == 200


def test_triton_hears_that_the_caller_has_left(url: str, tmp_path: Path) -> None:
    """By a deadline of the client, and by a connection that breaks."""
    for number, leave in enumerate(("timeout", "break")):
        told = tmp_path / str(number)
        order = json.dumps({"watch": str(told)}).encode()
        if leave == "timeout":
            with Client(url) as client, pytest.raises(Exception, match="within 0.5 s"):
                client.embed_images([order], timeout=0.5)
        else:
            data = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [order.decode()]}
            body = json.dumps({"inputs": [data]}).encode()
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = b"POST /v2/models/embed_image/infer HTTP/1.1\r\nHost: localhost\r\n"
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                time.sleep(0.5)
        end = time.monotonic() + 10
        while not told.exists() or not told.read_text():
            assert time.monotonic() < end, leave
            time.sleep(0.05)
        assert told.read_text() == "cancelled"
