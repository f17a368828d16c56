"""Stand-ins for a server: a transport that keeps what it is given, and sockets that answer what a
test says.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np

from radapter_client import Reply, Request


def described(version: int, **facts: Any) -> dict[str, Any]:
    """A model's configuration that describes one release."""
    known = {
        "version": version,
        "alpha": 0.5,
        "architecture": "ViT-B-32",
        "precision": "fp32",
        "embed_dim": 4,
        "logit_scale": 100.0,
        "templates": ["a photo of a {}."],
        "label_sets": {},
        **facts,
    }
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


@contextmanager
def http_server(
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    first: Sequence[tuple[int, bytes, dict[str, str]] | None] = (),
    port: int = 0,
) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one answer to all; its URL, and its requests: (method, path, headers,
    body, caller). The first requests get the answers `first`, where None breaks the connection.
    """
    left = list(first)
    last = (status, body, headers or {})
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            seen.append(
                (
                    self.command,
                    self.path,
                    self.headers,
                    self.rfile.read(length),
                    self.client_address,
                )
            )
            answer = left.pop(0) if left else last
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(answer[0])
            for name, value in {**answer[2], "Content-Length": str(len(answer[1]))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(answer[1])

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def grpc_server(code: grpc.StatusCode, text: str) -> Iterator[str]:
    """A server that fails every call in one way; its URL."""

    class Fails(grpc.GenericRpcHandler):
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, text))

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Fails()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
