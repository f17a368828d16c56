"""Paths of Triton that `radapter-serve` closes: no spelling opens one over HTTP or gRPC."""

from __future__ import annotations

import itertools
import json
import socket
from functools import partial

import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from radapter_serve.server.launch import SECRET_HEADER
from radapter_serve.server.triton_server import TritonServer

MEMORY = {"key": "/any", "offset": 0, "byte_size": 8}
CUDA = {"raw_handle": {"b64": ""}, "device_id": 0, "byte_size": 8}
FILE = "/tmp/radapter-never"  # nothing is written there: the request is refused
CLOSED = {
    "systemsharedmemory/status": None,
    "systemsharedmemory/region/x/register": MEMORY,
    "systemsharedmemory/region/x/unregister": {},
    "systemsharedmemory/unregister": {},
    "cudasharedmemory/status": None,
    "cudasharedmemory/region/x/register": CUDA,
    "cudasharedmemory/unregister": {},
    "repository/index": {},
    "repository/models/classify/load": {},
    "repository/models/classify/unload": {},
    "trace/setting": {"trace_file": FILE},
    "models/classify/trace/setting": {"trace_file": FILE},
    "logging": {"log_file": FILE, "log_verbose_level": 9},
}
# Spellings of a path: each part below /v2, and all of it as `{path}`
PATTERNS = (
    *("/v2/{path}", "/v2/{path}/", "/v2/{path}//", "//v2/{path}", "//{path}", "/v2//{path}"),
    *("/v2/{path}?", "/v2/{path}?a=b", "/v2/{path}#a", "/v2/{path};a=b", "/v2/{path}%00"),
    *("/v2/{path}%20", "/v2/{path}.", "/v2/{path}/.", "/v2/{path}/x/..", "/v2/./{path}"),
    *("/v2/x/../{path}", "/v2/models/classify/../../{path}", "/v2/health/ready/../../{path}"),
    *("/v2%2f{path}", "\\v2\\{path}", "/v1/../v2/{path}", "http://localhost/v2/{path}"),
    "http://other.invalid/v2/{path}",
)
METHODS = ("POST", "GET", "PUT", "DELETE", "HEAD", "get")
HEADERS: tuple[dict[str, str], ...] = (
    {},
    {SECRET_HEADER: ""},
    {SECRET_HEADER: "0" * 64},
    {SECRET_HEADER.upper(): "*"},
    {"X-Original-URL": "/v2/health/live", "X-Rewrite-URL": "/v2/health/live"},
    {"X-HTTP-Method-Override": "GET"},
    {"Connection": SECRET_HEADER},
    {"Triton-grpc-protocol": "health", "Inference-Header-Content-Length": "0"},
)


def ask(server: TritonServer, method: str, path: str, headers: dict[str, str], body: str) -> int:
    """The status of an answer, 0 where the connection closes without one."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "Content-Type: application/json", "", body]
    address = ("127.0.0.1", server.config.endpoints.http_port)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall("\r\n".join(lines).encode())
        connection.shutdown(socket.SHUT_WR)
        first = connection.makefile("rb").readline().split()
    return int(first[1]) if len(first) > 1 else 0


def state(server: TritonServer) -> dict[str, object]:
    """The settings that closed paths would change, read with the secret that opens them."""
    return {
        path: server.control.ask(path).body
        for path in ("systemsharedmemory/status", "cudasharedmemory/status", "logging")
    } | {"serving": server.control.serving(), "trace": server.control.ask("trace/setting").body}


@pytest.mark.triton
@pytest.mark.parametrize("path", CLOSED)
def test_no_spelling_of_a_path_opens_it(path: str, server: TritonServer) -> None:
    before = state(server)
    body = json.dumps(CLOSED[path] or {})
    spellings = [pattern.format(path=path) for pattern in PATTERNS]
    spellings += [f"/v2/{path.replace('/', slash)}" for slash in ("//", "%2f", "%252f", "/./")]
    spellings += [f"/v2/{path}".upper(), "/v2/" + "".join(f"%{ord(x):02x}" for x in path)]
    asked = [("POST", spelling, HEADERS[0]) for spelling in spellings]
    asked += [(method, f"/v2/{path}", each) for method in METHODS for each in HEADERS]
    statuses = {ask(server, *how, body) for how in asked}
    assert 403 in statuses  # the path itself is closed, and not only unknown
    assert statuses <= {0, 400, 403, 404, 405, 501}
    assert state(server) == before


@pytest.mark.triton
def test_no_closed_method_opens_over_grpc(
    server: TritonServer, client: grpc.InferenceServerClient
) -> None:
    before = state(server)
    calls = (
        partial(client.register_system_shared_memory, "x", "/any", 8),
        partial(client.unregister_system_shared_memory, "x"),
        client.get_system_shared_memory_status,
        partial(client.register_cuda_shared_memory, "x", b"", 0, 8),
        partial(client.unregister_cuda_shared_memory, "x"),
        client.get_cuda_shared_memory_status,
        client.get_model_repository_index,
        partial(client.load_model, "classify"),
        partial(client.unload_model, "classify"),
        partial(client.update_trace_settings, settings={"trace_file": FILE}),
        client.get_trace_settings,
        partial(client.update_log_settings, {"log_file": FILE}),
        client.get_log_settings,
    )
    secrets = (None, "", "0" * 64, "*", ",", server.control.url)
    for call, secret in itertools.product(calls, secrets):
        headers = None if secret is None else {SECRET_HEADER: secret}
        with pytest.raises(InferenceServerException, match="restricted"):
            call(headers=headers)
    assert state(server) == before
