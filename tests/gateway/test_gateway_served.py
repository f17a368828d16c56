"""The gateway in front of a real tritonserver: the same answers as without it, and Triton hears who
has left.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
import urllib3
from PIL import Image

from radapter_client import AsyncClient, Client, Request, ServerUnavailable
from radapter_client._http import HttpTransport
from radapter_client._url import parse_url
from tests.helpers.fake_server import TASKS, FakeServer
from tests.helpers.gateway import gateway

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def url(fake_server: FakeServer) -> Iterator[str]:
    with gateway(fake_server) as url:
        yield url


def png() -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((7, 5)).save(file, "PNG")
    return file.getvalue()


def texts(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], object)


IMAGE = np.array([png()], object)
PROPOSALS = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(2, 5, 7)
REQUESTS = {
    "embed_image": {
        "image": np.array([[b"a"], [png()]], object),
        "alpha": np.array([[0.1], [0.2]], np.float32),
    },
    "embed_text": {"text": np.array([["ü".encode()], [b"a\0b"], [b""]], object)},
    "classify": {
        "image": np.array([[b"x"], [b"y"]], object),
        "labels": np.array([[b"a", b"b"], [b"c", b"d"]], object),
    },
    "segment": {
        "image": IMAGE,
        "labels": texts("a", "ü"),
        "threshold": np.array([0.3], np.float32),
        "refine": np.array([3], np.int32),
        "proposals": PROPOSALS,
        "proposal_scores": np.full((2, 2), 0.1, np.float32),
    },
    "retrieve": {"text": texts("ü"), "index": texts("photos"), "top_k": np.array([3], np.int32)},
}
NAMED = {"retrieve": ("id", "score", "metadata", "thumbnail")}


@pytest.mark.parametrize("version", ["", "1", "2"])
@pytest.mark.parametrize("task", TASKS)
def test_the_same_bits_in_binary(
    fake_server: FakeServer, url: str, task: str, version: str
) -> None:
    request = Request("infer", task, version, REQUESTS[task], NAMED.get(task, ()))
    direct, through = (
        HttpTransport(parse_url(one)).send(request, 30) for one in (fake_server.http_url, url)
    )
    assert direct.version == through.version == int(version or 2)
    assert list(direct.outputs) == list(through.outputs)
    for name, array in direct.outputs.items():
        assert (
            array.dtype == through.outputs[name].dtype
            and array.shape == through.outputs[name].shape
        )
        assert array.tolist() == through.outputs[name].tolist()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_values_in_json(fake_server: FakeServer, url: str, task: str) -> None:
    kinds = {"O": "BYTES", "f": "FP32", "i": "INT32", "u": "UINT8"}
    inputs = [
        {
            "name": name,
            "datatype": kinds[array.dtype.kind],
            "shape": array.shape,
            "data": (
                [one.decode("latin-1") for one in array.ravel()]
                if array.dtype == object
                else array.tolist()
            ),
        }
        for name, array in REQUESTS[task].items()
    ]
    image = (
        '{"size": [7, 5]}' if task == "segment" else "eA=="
    )  # what the stand-in understands of an image in JSON
    for one in inputs:
        one["data"] = (
            [image] * len(REQUESTS[task]["image"]) if one["name"] == "image" else one["data"]
        )
    # Thumbnails are files, which JSON can't hold.
    outputs = [{"name": name} for name in NAMED.get(task, ()) if name != "thumbnail"]
    body = json.dumps(
        {"id": "7", "inputs": inputs, "outputs": outputs} if outputs else {"inputs": inputs}
    ).encode()
    headers = {"Content-Type": "application/json"}
    path = f"/v2/models/{task}/infer"
    answers = [
        urllib3.request("POST", one + path, body=body, headers=headers)
        for one in (fake_server.http_url, url)
    ]
    direct, through = (json.loads(answer.data) for answer in answers)
    assert through == direct and through["outputs"]


def calls(client: Any) -> list[Any]:
    images = [b"one", png(), b"three"]
    return [
        partial(client.classify, images, ["a", "ü", "c"]),
        partial(client.embed_images, images),
        partial(client.embed_texts, ["a", "ü"]),
        partial(client.search, "ü", index="photos", top_k=3, thumbnails=True),
        partial(client.segment, [png(), png()], ["a", "b"], threshold=0.5),
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
    return (
        {key: plain(value) for key, value in vars(found).items()}
        if hasattr(found, "__dict__")
        else found
    )


def test_both_clients_work_unchanged(fake_server: FakeServer, url: str) -> None:
    async def awaited(where: str) -> list[Any]:
        async with AsyncClient(where, batch_size=2) as client:
            return [plain(await call()) for call in calls(client)]

    def all_of(where: str) -> list[Any]:
        with Client(where, batch_size=2) as client:
            return [plain(call()) for call in calls(client)]

    direct = all_of(fake_server.grpc_url)
    assert direct[-1] is True
    assert all_of(url) == asyncio.run(awaited(url)) == direct


def test_readiness_asks_the_models(url: str) -> None:
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


def test_errors_of_a_task_keep_their_codes(url: str) -> None:
    for order, status, text in (
        ({"error": "[invalid_image] it is none"}, 400, "[invalid_image] it is none"),
        (
            {"bug": True},
            500,
            "[internal_error] the server failed on this request; its log says why",
        ),
    ):
        data = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [json.dumps(order)]}
        answer = urllib3.request(
            "POST", f"{url}/v2/models/embed_image/infer", json={"inputs": [data]}
        )
        assert (answer.status, answer.json()) == (status, {"error": text})


def test_the_client_of_openai_gets_the_same_embeddings(fake_server: FakeServer, url: str) -> None:
    import openai  # here: it takes long to load

    data = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    texts = [f"text {number}" for number in range(70)]  # more than a batch
    with (
        Client(fake_server.grpc_url) as direct,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        found = client.embeddings.create(model="radapter", input=[*texts, data, "ü"])
        expected = np.concatenate(
            [direct.embed_texts(texts), direct.embed_images([png()]), direct.embed_texts(["ü"])]
        )
        assert (
            np.array([one.embedding for one in found.data], np.float32).tolist()
            == expected.tolist()
        )
        assert found.model == "radapter-2"
        assert client.embeddings.create(model="radapter-1", input="a").model == "radapter-1"
        assert [model.id for model in client.models.list()] == [
            "radapter",
            "radapter-2",
            "radapter-1",
        ]
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="radapter-3", input="a")


def test_over_tls_with_a_key(
    fake_server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "chain.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    keys = tmp_path / "keys"
    from radapter_serve.gateway.keys import new_key

    key = new_key(keys, "ann")
    options = {
        "tls_certificate": tmp_path / "chain.pem",
        "tls_key": tmp_path / "key.pem",
        "api_keys": keys,
    }
    with gateway(fake_server, **options) as url:
        with (
            Client(url, api_key=key, retries=0) as client,
            pytest.raises(ServerUnavailable, match="(?i)certificate"),
        ):
            client.release()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        with Client(url, api_key=key) as client:
            assert client.release().version == 2
            assert client.embed_texts(["a"]).shape == (1, 4)
