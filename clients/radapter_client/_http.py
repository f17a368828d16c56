"""HTTP by urllib3: the KServe protocol with binary tensors after the JSON.

Asynchronous calls wait for urllib3 in threads: httpx's client takes two to eight times the CPU time
for a request. tritonclient has code for the bodies, too, but importing it takes gevent,
geventhttpclient and rapidjson.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import math
import socket
import ssl
import struct
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import numpy as np
import urllib3
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.connection import create_connection

from ._wire import Array, Reply, Request, ServerURL
from .failures import ServerError, ServerUnavailable, Timeout, from_server

HEADER_LENGTH = "Inference-Header-Content-Length"
CONNECTIONS = 64  # kept open for the next request; more are opened where more threads ask
THREADS = 1024  # started as they are needed


class HttpTransport:
    def __init__(self, url: ServerURL, api_key: str | None = None) -> None:
        self._url = url
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._open: set[HTTPConnection] = set()
        kind = _HttpsPool if url.secure else _HttpPool
        self._pool = kind(url.host, url.port, maxsize=CONNECTIONS, open_connections=self._open)

    def send(self, request: Request, timeout: float) -> Any:
        body, headers = encode(request) if request.action == "infer" else (None, {})
        version = f"/versions/{request.version}" if request.version else ""
        path = f"/v2/models/{quote(request.model)}{version}/{request.action}"
        response = self._request(path, body, headers, timeout)
        return answer(request, response.status, response.data, response.headers, str(self._url))

    def live(self, timeout: float) -> int:
        """The status of the answer to whether the server is live."""
        return self._request("/v2/health/live", None, {}, timeout).status

    def _request(
        self, path: str, body: bytes | None, headers: dict[str, str], timeout: float
    ) -> urllib3.BaseHTTPResponse:
        try:
            return self._pool.request(
                "GET" if body is None else "POST",
                self._url.path + path,
                body=body,
                headers=headers | self._headers,
                timeout=urllib3.Timeout(total=timeout),
                retries=False,
                redirect=False,
            )
        except urllib3.exceptions.HTTPError as error:
            # A time-out while the body is being sent is wrapped; to urllib3, a connection that is
            # refused is one, too.
            late = isinstance(error, urllib3.exceptions.TimeoutError) or any(
                isinstance(argument, TimeoutError) for argument in error.args
            )
            if late and not isinstance(error, urllib3.exceptions.NewConnectionError):
                raise self.late(timeout) from error
            why = f"no answer from {self._url}: {_reason(error)}"
            raise ServerUnavailable(f"{why}; is the server running (radapter-serve)?") from error

    def late(self, timeout: float) -> Timeout:
        return Timeout(f"no answer from {self._url} within {timeout:g} s")

    def close(self) -> None:
        """Ends the connections, those in use as well."""
        self._pool.close()
        for connection in list(self._open):
            # One that is closed by now has no socket.
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it


class AsyncHttpTransport:
    """A cancelled request still occupies a thread until it is answered, or its time-out is over."""

    def __init__(self, url: ServerURL, api_key: str | None = None) -> None:
        self._http = HttpTransport(url, api_key)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="radapter-client-http")

    async def send(self, request: Request, timeout: float) -> Any:
        answer = asyncio.get_running_loop().run_in_executor(
            self._threads, self._http.send, request, timeout
        )
        try:
            return await asyncio.wait_for(answer, timeout)
        except asyncio.TimeoutError as error:
            raise self._http.late(timeout) from error

    async def close(self) -> None:
        self._http.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def answer(
    request: Request, status: int, body: bytes, headers: Mapping[str, str], where: str
) -> Any:
    """The answer in HTTP as `Transport.send` returns it; `where` names the server in messages."""
    if request.action == "ready" and status in (200, 400, 404):
        return status == 200
    if status != 200:
        text = body.decode("utf-8", "replace")
        try:
            message = str(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError):
            message = text[:200]
        failed = from_server(str(status), message)
        failed.request_id = headers.get("X-Request-Id")
        wait = headers.get("Retry-After")
        if isinstance(failed, ServerUnavailable) and wait:
            with contextlib.suppress(urllib3.exceptions.InvalidHeader):
                failed.retry_after = max(0.0, urllib3.Retry().parse_retry_after(wait))
        raise failed
    try:
        if request.action != "infer":
            return json.loads(body)
        return decode(body, headers.get(HEADER_LENGTH))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ServerError(f"{where} answers, but not as a Triton server does: {error!r}") from error


def encode(request: Request) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an inference."""
    tensors = []
    parts = []
    for name, array in request.inputs.items():
        data = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        parts.append(data)
        tensors.append(
            {
                "name": name,
                "shape": array.shape,
                "datatype": np_to_triton_dtype(array.dtype),
                "parameters": {"binary_data_size": len(data)},
            }
        )
    head: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if request.outputs:  # then the parameter above does not count
        head["outputs"] = [
            {"name": name, "parameters": {"binary_data": True}} for name in request.outputs
        ]
    text = json.dumps(head).encode()
    return b"".join([text, *parts]), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(text)),
    }


def decode(body: bytes, length: str | None) -> Reply:
    """The reply in a body, of which `length` bytes are JSON and the rest are tensors; all is JSON
    where it is None.
    """
    end = len(body) if length is None else int(length)
    head = json.loads(body[:end])
    outputs: dict[str, Array] = {}
    for output in head["outputs"]:
        shape = [int(side) for side in output["shape"]]
        kind = triton_to_np_dtype(output["datatype"])
        if "data" in output:
            values = (
                [text.encode() for text in output["data"]] if kind is np.object_ else output["data"]
            )
            array = np.array(values, kind)
        else:
            start = end
            end += int(output["parameters"]["binary_data_size"])
            data = memoryview(body)[start:end]
            array = (
                deserialize_bytes_tensor(data) if kind is np.object_ else np.frombuffer(data, kind)
            )
        outputs[output["name"]] = array.reshape(shape)
    return Reply(int(head["model_version"]), outputs)


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """The reason of an error, without urllib3's name of the connection."""
    inner = [argument for argument in error.args if isinstance(argument, Exception)]
    cause = error.__cause__ or (inner[-1] if inner else error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause)


class _UntilDeadline(io.RawIOBase):
    """The bytes that a connection receives, until its request's time is over.

    A socket's own time-out starts again with every byte, so that a server which sends one byte a
    second would hold a caller for as long as it likes.
    """

    def __init__(
        self, received: io.RawIOBase, sock: socket.socket, connection: HTTPConnection
    ) -> None:
        self._received = received
        self._sock = sock
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._connection.timeout)
        return self._received.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        self._received.close()
        super().close()


class _EndsInTime(HTTPConnection):
    """Ends a request at its deadline, answer included, and is in a set while it is open.

    To urllib3 a time-out bounds each step by itself: each address of the host, the TLS handshake,
    each part sent. Here the time of a request begins where urllib3 sets `timeout`, before the
    first step, and every step gets what is left.
    """

    def __init__(self, *args: Any, open_connections: set[HTTPConnection], **options: Any) -> None:
        self._deadline = math.inf
        super().__init__(*args, **options)
        self._open_connections = open_connections

    @property
    def timeout(self) -> float:
        """Seconds that are left; never 0, with which a socket would not wait at all."""
        return max(self._deadline - time.monotonic(), 1e-6)

    @timeout.setter
    def timeout(self, seconds: Any) -> None:
        # A connection that is made has no number yet; a request gives it one.
        if isinstance(seconds, (int, float)):
            self._deadline = time.monotonic() + seconds

    def _new_conn(self) -> socket.socket:
        try:
            addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        failure: OSError | None = None
        for *_, address in addresses:
            try:
                sock = create_connection(
                    (str(address[0]), self.port), self.timeout, socket_options=self.socket_options
                )
            except OSError as error:
                failure = error
            else:
                sock.settimeout(self.timeout)  # of the handshake that may follow
                return sock
        if isinstance(failure, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(self, str(failure)) from failure
        raise urllib3.exceptions.NewConnectionError(self, str(failure)) from failure

    def connect(self) -> None:
        super().connect()
        self._open_connections.add(self)

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(self.timeout)
        super().send(data)

    def response_class(  # type: ignore[override]
        self, sock: socket.socket, *args: Any, **options: Any
    ) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, *args, **options)
        received = response.fp.detach()
        response.fp = io.BufferedReader(_UntilDeadline(received, sock, self))
        return response

    def close(self) -> None:
        self._open_connections.discard(self)
        super().close()


class _SecureEndsInTime(_EndsInTime, HTTPSConnection):
    """The same over TLS."""


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _EndsInTime


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureEndsInTime
