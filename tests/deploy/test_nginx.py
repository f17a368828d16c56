"""The recipe for nginx, where it is installed: it lets through what it says and nothing else."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import grpc
import pytest
import trustme

from radapter_serve.server.config import free_ports
from tests.deploy.files import DEPLOY
from tests.helpers.answering import Answer, answering
from tests.helpers.fake_upstream import until

pytestmark = pytest.mark.integration

CONF = DEPLOY / "nginx.conf"
KEY = {"Authorization": "Bearer right"}
SERVICE = "/inference.GRPCInferenceService/"


def gateway(method: str, path: str, headers: Message, body: bytes) -> Answer:
    """Answers everything, with a key; its health without one."""
    let_in = "/health/" in path or headers.get("Authorization") == KEY["Authorization"]
    return 200 if let_in else 401, {}, b""


class Triton(grpc.GenericRpcHandler):
    """Answers every call with its own name."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = str(handler_call_details.method).encode()
        return grpc.unary_unary_rpc_method_handler(lambda request, context: name)


@dataclass
class Proxy:
    """A running nginx: its two ports, and what trusts its certificate."""

    https: int
    grpcs: int
    tls: ssl.SSLContext
    authority: bytes

    def status(
        self, method: str, path: str, headers: Mapping[str, str] = {}, length: int = 0
    ) -> int:
        """The status of a request whose body, of so many bytes, does not come."""
        connection = http.client.HTTPSConnection(
            "localhost", self.https, context=self.tls, timeout=10
        )
        connection.request(method, path, headers={**headers, "Content-Length": str(length)})
        status = connection.getresponse().status
        connection.close()
        return status

    def call(self, method: str, key: str = "") -> str:
        """The name of the call that Triton got, or the status."""
        credentials = grpc.ssl_channel_credentials(self.authority)
        with grpc.secure_channel(f"localhost:{self.grpcs}", credentials) as channel:
            metadata = [("authorization", f"Bearer {key}")] if key else []
            try:
                return channel.unary_unary(method)(b"", timeout=10, metadata=metadata).decode()
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    folder: Path = tmp_path_factory.mktemp("nginx")
    authority = trustme.CA()
    both = authority.issue_cert("localhost").private_key_and_cert_chain_pem
    for name in ("privkey.pem", "fullchain.pem"):
        both.write_to_path(folder / name)
    triton = grpc.server(ThreadPoolExecutor(2), handlers=[Triton()])
    https, grpcs, _ = free_ports()
    text = CONF.read_text(encoding="utf-8").replace("/etc/nginx/tls", str(folder))
    text = text.replace("127.0.0.1:8001", f"127.0.0.1:{triton.add_insecure_port('127.0.0.1:0')}")
    for port, free_port in ((443, https), (8443, grpcs)):
        text = text.replace(f"listen {port} ssl", f"listen 127.0.0.1:{free_port} ssl")
    # Use a folder that a user without rights may write, and that no other nginx uses.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    text = text.replace(
        "http {", "http {\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds), 1
    )
    settings = ["-p", str(folder), "-e", "stderr", "-g", f"pid {folder}/pid; daemon off;"]
    command = [nginx, *settings, "-c", str(folder / "nginx.conf")]

    def is_there() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", grpcs)) == 0

    with answering(gateway) as port:
        text = text.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
        (folder / "nginx.conf").write_text(text, encoding="utf-8")
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "[warn]" not in checked.stderr
        triton.start()
        process = subprocess.Popen(command)
        try:
            until(is_there)
            tls = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
            yield Proxy(https, grpcs, tls, authority.cert_pem.bytes())
        finally:
            process.terminate()
            process.wait()
            triton.stop(None).wait()


OPEN = [
    *("GET /v2/health/ready", "GET /v2/models/classify/config", "GET /v2", "POST /v1/embeddings"),
    *("GET /v2/models/classify/versions/3/config", "POST /v2/models/classify/infer"),
    *("GET /v1/models", "GET /v1/models/radapter-1", "GET /v2/models/retrieve/indexes"),
]
CLOSED = [
    *("GET /v1/models/a/b", "POST /v1/embeddings/../../metrics", "POST /v1/chat/completions"),
    *("GET /metrics", "POST /v2/repository/index", "POST /v2/models/classify/trace/setting"),
    "POST /v2/models/classify/../../repository/index",
    *("POST /v2/models/classify/..%2f..%2flogging", "GET /v2/systemsharedmemory/status"),
    *("POST /v2/logging", "GET /key", "GET /"),
]


def test_paths_keys_and_bodies(proxy: Proxy) -> None:
    for requests, status in ((OPEN, 200), (CLOSED, 404)):
        for request in requests:
            method, path = request.split(" ")
            assert proxy.status(method, path, KEY) == status, request
    infer = "/v2/models/classify/infer"
    assert proxy.status("POST", infer) == 401
    assert proxy.status("GET", "/v2/health/ready") == 200
    assert proxy.status("POST", infer, KEY, length=65 * 2**20) == 413  # before it comes


def test_calls_of_the_client_pass_with_a_key_and_others_never(proxy: Proxy) -> None:
    for name in ("ServerReady", "ModelReady", "ModelConfig", "ModelStatistics", "ModelInfer"):
        method = SERVICE + name
        assert proxy.call(method, "right") == method
        assert proxy.call(method, "wrong") == proxy.call(method) == "UNAUTHENTICATED"
    for name in ("RepositoryModelLoad", "SystemSharedMemoryRegister", "TraceSetting"):
        assert proxy.call(SERVICE + name, "right") == "UNIMPLEMENTED"
