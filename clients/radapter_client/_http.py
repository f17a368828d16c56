"""The HTTP transport: the KServe protocol with binary tensors after the JSON.

urllib3 takes between an eighth and a half of the CPU time of httpx.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import math
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import quote

import numpy as np
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from ._wire import Reply, Request, ServerURL
from .failures import ServerError, ServerUnavailable, Timeout, from_server, reading
from .tensors import DATATYPES, MAX_ANSWER, NUMPY, Array, pack, unpack

HEADER_LENGTH = "Inference-Header-Content-Length"
CONNECTIONS = 64  # kept open for later requests; more threads open further ones
MAX_JSON = 32 * 2**20  # bytes of an answer's JSON, whose objects take many times the memory
PART = 2**18  # bytes that are read at once, whatever length the server names


class HttpTransport:
    def __init__(self, url: ServerURL, api_key: str | None = None) -> None:
        self._url = url
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._open: set[HTTPConnection] = set()
        pool: Any = urllib3.HTTPSConnectionPool if url.secure else urllib3.HTTPConnectionPool
        self._pool = pool(url.host, url.port, maxsize=CONNECTIONS, open_connections=self._open)
        self._pool.ConnectionCls = _SecureEndsInTime if url.secure else _EndsInTime

    def send(self, request: Request, timeout: float) -> Any:
        body, headers = encode(request) if request.action == "infer" else (None, {})
        version = f"/versions/{request.version}" if request.version else ""
        path = f"{self._url.path}/v2/models/{quote(request.model)}{version}/{request.action}"
        try:
            response = self._pool.request(
                "GET" if body is None else "POST",
                path,
                body=body,
                headers=headers | self._headers,
                timeout=urllib3.Timeout(total=timeout),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,  # no coding is asked for, and a small body could grow
            )
            answer = b"".join(response.stream(PART))
            response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            # urllib3 wraps a time-out while the body is sent, and counts a refused connection
            # as a time-out, which it is not.
            late = isinstance(error, urllib3.exceptions.TimeoutError) or any(
                isinstance(argument, TimeoutError) for argument in error.args
            )
            if late and not isinstance(error, urllib3.exceptions.NewConnectionError):
                raise Timeout(f"no answer from {self._url} within {timeout:g} s") from error
            why = f"no answer from {self._url}: {_reason(error)}"
            raise ServerUnavailable(f"{why}; is the server running (radapter-serve)?") from error

        # Failure reported by the server
        status = response.status
        if request.action == "ready" and status in (200, 400, 404):
            return status == 200
        if status != 200:
            message = answer[:200].decode("utf-8", "replace")
            with contextlib.suppress(ServerError), reading():
                message = str(_json(answer)["error"])
            failed = from_server(str(status), message)
            failed.request_id = response.headers.get("X-Request-Id")
            wait = response.headers.get("Retry-After")
            if isinstance(failed, ServerUnavailable) and wait:
                with contextlib.suppress(ServerError), reading():
                    failed.retry_after = float(max(0, urllib3.Retry().parse_retry_after(wait)))
            raise failed

        # Reply
        with reading(self._url):
            if request.action != "infer":
                return _json(answer)
            return decode(answer, response.headers.get(HEADER_LENGTH))

    def close(self) -> None:
        """Close all connections, also those in use."""
        self._pool.close()
        for connection in list(self._open):
            # A connection that was closed meanwhile has no socket.
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it


def encode(request: Request) -> tuple[bytes, dict[str, str]]:
    """Encode an inference as body and headers."""
    tensors = []
    parts = []
    for name, array in request.inputs.items():
        data = pack(array)
        parts.append(data)
        tensors.append(
            {
                "name": name,
                "shape": array.shape,
                "datatype": DATATYPES[array.dtype],
                "parameters": {"binary_data_size": len(data)},
            }
        )
    head: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if request.outputs:  # with named outputs the parameter above has no effect
        head["outputs"] = [
            {"name": name, "parameters": {"binary_data": True}} for name in request.outputs
        ]
    text = json.dumps(head).encode()
    return b"".join([text, *parts]), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(text)),
    }


def decode(body: bytes, length: str | None) -> Reply:
    """Decode the body of a reply: `length` bytes of JSON, None for all, then the tensors."""
    end = len(body) if length is None else int(length)
    head = _json(body[:end])
    outputs: dict[str, Array] = {}
    for output in head["outputs"]:
        datatype = output["datatype"]
        shape = [int(side) for side in output["shape"]]
        if "data" in output:
            texts = datatype == "BYTES"
            values = [text.encode() for text in output["data"]] if texts else output["data"]
            array = np.array(values, NUMPY[datatype]).reshape(shape)
        else:
            start = end
            end += int(output["parameters"]["binary_data_size"])
            array = unpack(memoryview(body)[start:end], datatype, shape)
        outputs[output["name"]] = array
    return Reply(int(head["model_version"]), outputs)


def _json(text: bytes) -> Any:
    if len(text) > MAX_JSON:
        raise ValueError(f"{len(text):,} bytes of JSON; at most {MAX_JSON:,} are read")
    return json.loads(text)


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """Message of the underlying error, without urllib3's description of the connection."""
    inner = [argument for argument in error.args if isinstance(argument, Exception)]
    cause = error.__cause__ or (inner[-1] if inner else error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause)


class _Answer(io.RawIOBase):
    """The bytes of an answer, at most `MAX_ANSWER`, until the request's deadline. A socket's own
    time-out starts again with every byte, and does not count while bytes keep coming.
    """

    def __init__(
        self, received: io.RawIOBase, sock: socket.socket, connection: _EndsInTime
    ) -> None:
        self._received = received
        self._sock = sock
        self._connection = connection
        self._room = MAX_ANSWER

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._connection.is_late:
            raise TimeoutError
        self._sock.settimeout(self._connection.timeout)
        count: int | None = self._received.readinto(buffer)  # type: ignore[attr-defined]
        self._room -= count or 0
        if self._room < 0:
            raise ServerError(f"the server's answer has more than {MAX_ANSWER:,} bytes")
        return count

    def close(self) -> None:
        self._received.close()
        super().close()


class _EndsInTime(HTTPConnection):
    """A connection that ends a request at its deadline, answer included: each step gets the time
    that is left.
    """

    def __init__(self, *args: Any, open_connections: set[HTTPConnection], **options: Any) -> None:
        self._deadline = math.inf
        super().__init__(*args, **options)
        self._open_connections = open_connections

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    @property
    def timeout(self) -> float:
        """Seconds left, never 0, which would make the socket non-blocking."""
        return max(self._deadline - time.monotonic(), 1e-6)

    @timeout.setter
    def timeout(self, seconds: Any) -> None:
        # A new connection gets a placeholder; each request sets a number before its first step.
        if isinstance(seconds, (int, float)):
            self._deadline = time.monotonic() + seconds

    def _new_conn(self) -> socket.socket:
        """Connect to one of the host's addresses; each gets its share of the time that is left."""
        error: OSError = TimeoutError()
        addresses = self._resolve()
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(self.timeout / (len(addresses) - number))
                sock.connect(address)
                sock.settimeout(self.timeout)  # for the TLS handshake
                return sock
            except OSError as failed:
                sock.close()
                error = failed
        if isinstance(error, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(self, "no connection in time") from error
        raise urllib3.exceptions.NewConnectionError(self, str(error)) from error

    def _resolve(self) -> list[Any]:
        """Look up the host's addresses in a thread, as no resolver takes a time-out."""
        results: list[Any] = []

        def look_up() -> None:
            try:
                host = (self._dns_host.strip("[]"), self.port)
                results.append(socket.getaddrinfo(*host, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                results.append(error)

        thread = threading.Thread(target=look_up, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not results:
            raise urllib3.exceptions.ConnectTimeoutError(self, f"{self.host} was not looked up")
        if isinstance(results[0], socket.gaierror):
            error = results[0]
            raise urllib3.exceptions.NameResolutionError(self.host, self, error) from error
        if isinstance(results[0], Exception):
            raise urllib3.exceptions.NewConnectionError(self, str(results[0])) from results[0]
        return results[0]  # type: ignore[no-any-return]

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
        response.fp = io.BufferedReader(_Answer(received, sock, self))
        return response

    def close(self) -> None:
        self._open_connections.discard(self)
        super().close()


class _SecureEndsInTime(_EndsInTime, HTTPSConnection):
    """A TLS connection that ends a request at its deadline."""
