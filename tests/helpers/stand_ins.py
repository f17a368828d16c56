"""Stand-ins for a server: a transport that keeps what it is given, and sockets that answer what a
test says.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import grpc
import numpy as np
from PIL import Image

from radapter_client import InvalidImage, InvalidRequest, Reply, Request
from tests.helpers.answering import Answer, listening
from tests.helpers.small_models import release


def described(version: int, **facts: Any) -> dict[str, Any]:
    """A model's configuration that describes one release."""
    known = {**release(version, embed_dim=4).to_dict(), **facts}
    return {"parameters": {f"release.{version}": {"string_value": json.dumps(known)}}}


class Recorder:
    """Keeps every request, and answers what fits it: zeros, the first label, an upright mask of 4 x
    5 pixels.
    """

    def __init__(self, **facts: Any) -> None:
        self.requests: list[Request] = []
        self.timeouts: list[float] = []
        self.facts = facts

    @property
    def inferences(self) -> list[Request]:
        return [request for request in self.requests if request.action == "infer"]

    def send(self, request: Request, timeout: float) -> Any:
        self.requests.append(request)
        self.timeouts.append(timeout)
        if request.action == "config":
            return described(1, **self.facts)
        if request.action == "indexes":
            return {"indexes": ["photos"]}
        if request.action != "infer":
            return True if request.action == "ready" else {}
        return Reply(int(request.version or 1), self._outputs(request))

    def _outputs(self, request: Request) -> dict[str, np.ndarray]:
        if request.model in ("embed_image", "embed_text"):
            name = request.model.removeprefix("embed_")
            return {f"{name}_embeds": np.zeros((len(request.inputs[name]), 4), np.float32)}
        if request.model == "classify":
            rows = len(request.inputs["image"])
            label = request.inputs.get("labels", np.array([[b"a"]], object))[:1, :1]
            return {"label": np.repeat(label, rows, 0), "score": np.ones((rows, 1), np.float32)}
        if request.model == "segment":
            labels = request.inputs["labels"]
            return {
                "mask": np.zeros((4, 5), np.uint16),
                "label": labels,
                "score": np.ones(len(labels), np.float32),
            }
        texts = {"id": b"a.jpg", "metadata": b'{"path": "a.jpg"}', "thumbnail": b""}
        return {"score": np.ones(1, np.float32)} | {
            k: np.array([v], object) for k, v in texts.items()
        }

    def close(self) -> None:
        pass


class Answers(Recorder):
    """Has the releases 1 and 2; scores labels by their place, and the first as much more as α says;
    cuts a picture into stripes, a label each; and has three pictures in an index "photos".
    """

    def send(self, request: Request, timeout: float) -> Any:
        reply = super().send(request, timeout)
        if request.action == "config":
            first, second = (described(version, **self.facts)["parameters"] for version in (1, 2))
            return {"parameters": first | second}
        if request.action == "infer":
            return Reply(int(request.version or 2), reply.outputs)
        return reply

    def _outputs(self, request: Request) -> dict[str, np.ndarray]:
        inputs = request.inputs
        if "image" in inputs and b"broken" in inputs["image"].ravel().tolist():
            raise InvalidImage("no image", code="invalid_image")
        labels = inputs.get("labels", np.array([b"a", b"b", b"c"], object))
        if request.model == "classify":
            names = np.atleast_2d(labels)[:1, : inputs["top_k"][0, 0] if "top_k" in inputs else 5]
            rows = len(inputs["image"])
            scores = np.linspace(0.75, 0.25, names.shape[1], dtype=np.float32)
            scores[0] += inputs["alpha"][0, 0] / 5 if "alpha" in inputs else 0
            return {"label": np.repeat(names, rows, 0), "score": np.tile(scores, (rows, 1))}
        if request.model == "segment":
            width, height = Image.open(io.BytesIO(inputs["image"][0])).size
            mask = np.add.outer(np.zeros(height), np.arange(width)) % len(labels)
            scores = np.full(len(labels), 0.5, np.float32)
            return {"mask": mask.astype(np.uint16), "label": labels, "score": scores}
        if request.model != "retrieve":
            return super()._outputs(request)
        if inputs["index"][0] != b"photos":
            raise InvalidRequest("no index 'none'; there are: photos", code="unknown_index")
        where = inputs["where"][0].decode() if "where" in inputs else ""
        files = [io.BytesIO() for _ in range(3)]
        for colour, file in zip(("red", "green", "blue"), files, strict=True):
            Image.new("RGB", (8, 8), colour).save(file, "PNG")
        return {
            "id": np.array([b"ordner/bild [b]\xc3\xbc.jpg", b"b.jpg", b"c.jpg"], object),
            "score": np.array([0.75, 0.5, -0.5], np.float32),
            "metadata": np.array([json.dumps({"where": where}).encode(), b"{}", b"{}"], object),
            "thumbnail": np.array([file.getvalue() for file in files], object),
        }


@contextmanager
def http_server(
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    first: Sequence[tuple[int, bytes, dict[str, str]] | None] = (),
) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one answer to all; its URL, and its requests: (method, path, headers,
    body, caller). The first requests get the answers `first`, where None breaks the connection.
    """
    replies = list(first)
    requests: list[Any] = []

    def answer(handler: BaseHTTPRequestHandler, data: bytes) -> Answer | None:
        requests.append(
            (handler.command, handler.path, handler.headers, data, handler.client_address)
        )
        reply = replies.pop(0) if replies else (status, body, headers or {})
        return reply and (reply[0], reply[2], reply[1])

    with listening(answer) as port:
        yield f"http://127.0.0.1:{port}", requests


@contextmanager
def grpc_server(
    *failures: tuple[grpc.StatusCode, str], answer: bytes | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """A server that fails in these ways, one a call, and then gives an answer; without one, every
    call fails in the first way. Its URL, and the metadata of its calls.
    """
    rest = list(failures)
    calls: list[Any] = []

    def call(request: bytes, context: grpc.ServicerContext) -> bytes | None:
        calls.append(dict(context.invocation_metadata()))
        if answer is None or rest:
            context.abort(*(rest.pop(0) if answer is not None else rest[0]))
        return answer

    class Service(grpc.GenericRpcHandler):
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(call)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Service()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", calls
    finally:
        server.stop(None).wait()
