"""gRPC: tritonclient's own clients, of which the synchronous one is safe from several threads."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from typing import Any

import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ._wire import PORTS, Reply, Request, ServerURL
from .failures import (
    InvalidRequest,
    InvalidURL,
    RAdapterClientError,
    ServerUnavailable,
    Timeout,
    from_server,
)

CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's own waits up to two minutes before it looks again for a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # As over HTTP: an http_proxy of the environment is not for the model server.
    ("grpc.enable_http_proxy", 0),
]
METHODS = {
    "infer": "infer",
    "config": "get_model_config",
    "ready": "is_model_ready",
}
# gRPC says UNAVAILABLE of a server that accepts a connection and then is silent for a second; in
# all clients of the process, for they share connections.
SILENT = re.compile("timed out|timeout|handshaker shutdown", re.IGNORECASE)
# What gRPC says of a server that speaks something else, and of one that has just ended.
CLOSED = "Socket closed"
REFUSED = "Connection refused"
PROBE_SECONDS = 1.0  # at most, to find out why a call failed


def http_status(url: ServerURL, timeout: float) -> int | None:
    """The status with which a server answers HTTP/1.1 there; None where it does not in time."""
    from ._http import HttpTransport

    transport = HttpTransport(url)
    try:
        return transport.live(min(timeout, PROBE_SECONDS))
    except RAdapterClientError:
        return None
    finally:
        transport.close()


class _Grpc:
    def __init__(self, url: ServerURL, api_key: str | None = None) -> None:
        self._url = url
        self._headers = None if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._options = {"url": url.address, "ssl": url.secure, "channel_args": CHANNEL}

    def _call(self, client: Any, request: Request, timeout: float) -> Any:
        """Call the client's method, which returns an answer, or a coroutine of one."""
        if request.action not in METHODS:
            raise InvalidRequest(f"gRPC has no call for {request.action}")
        arguments: dict[str, Any] = {
            "model_name": request.model,
            "model_version": request.version,
            "client_timeout": timeout,
            "headers": self._headers,
        }
        if request.action == "infer":
            arguments["inputs"] = []
            for name, array in request.inputs.items():
                tensor = tritonclient.grpc.InferInput(
                    name, list(array.shape), np_to_triton_dtype(array.dtype)
                )
                arguments["inputs"].append(tensor.set_data_from_numpy(array))
            arguments["outputs"] = [
                tritonclient.grpc.InferRequestedOutput(name) for name in request.outputs
            ] or None
        elif request.action != "ready":
            arguments["as_json"] = True
        return getattr(client, METHODS[request.action])(**arguments)

    def _reply(self, request: Request, reply: Any) -> Any:
        if request.action == "infer":
            response = reply.get_response()
            outputs = {output.name: reply.as_numpy(output.name) for output in response.outputs}
            return Reply(int(response.model_version), outputs)
        return reply["config"] if request.action == "config" else reply

    def _error(self, error: InferenceServerException, timeout: float) -> RAdapterClientError:
        status = str(error.status()).removeprefix("StatusCode.")
        text = str(error.message())
        if status == "DEADLINE_EXCEEDED":
            return Timeout(f"no answer from {self._url} within {timeout:g} s")
        # A server that stops cancels what it has not answered.
        if status in ("UNAVAILABLE", "CANCELLED"):
            reported = from_server(status, text)
            if reported.code is not None:  # by a task or by Triton, and not by gRPC
                return reported
            if CLOSED in text and http_status(self._url, timeout) is not None:
                scheme = "https" if self._url.secure else "http"
                return InvalidURL(
                    f"{self._url} answers HTTP and no gRPC, as radapter-serve --engine process and"
                    f" radapter-gateway do; write {scheme}://{self._url.address}"
                )
            # An engine in one process listens for HTTP alone.
            other = ServerURL("http", self._url.host, PORTS["http"])
            if REFUSED in text and not self._url.secure and http_status(other, timeout) == 200:
                return ServerUnavailable(
                    f"no answer from {self._url}: nobody listens there, but a server answers HTTP"
                    f' at {other}; write Client("{other}"), or --url {other}'
                )
            kind = Timeout if SILENT.search(text) else ServerUnavailable
            return kind(
                f"no answer from {self._url}: {text}; is the server running (radapter-serve)?"
            )
        return from_server(status, text)


class _QuietAtExit(tritonclient.grpc.InferenceServerClient):  # type: ignore[misc]  # it has no types
    """tritonclient's own closes itself once more at the interpreter's end, when gRPC's modules are
    empty already.
    """

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            super().__del__()


class GrpcTransport(_Grpc):
    def __init__(self, url: ServerURL, api_key: str | None = None) -> None:
        super().__init__(url, api_key)
        self._client = _QuietAtExit(**self._options)

    def send(self, request: Request, timeout: float) -> Any:
        try:
            return self._reply(request, self._call(self._client, request, timeout))
        except InferenceServerException as error:
            raise self._error(error, timeout) from error

    def close(self) -> None:
        self._client.close()


class AsyncGrpcTransport(_Grpc):
    _client: Any = None  # belongs to the event loop of the first call

    async def send(self, request: Request, timeout: float) -> Any:
        if self._client is None:
            self._client = tritonclient.grpc.aio.InferenceServerClient(**self._options)
        try:
            return self._reply(request, await self._call(self._client, request, timeout))
        except InferenceServerException as error:
            # In a thread, for it may ask another port.
            raise await asyncio.to_thread(self._error, error, timeout) from error

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
