"""Triton's protocol buffers, for the gateway too, and the gRPC transport of the client."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ._wire import Reply, Request, ServerURL
from .failures import (
    InvalidRequest,
    RAdapterClientError,
    ServerError,
    ServerUnavailable,
    Timeout,
    from_server,
    reading,
)
from .tensors import DATATYPES, MAX_ANSWER, Array, pack, unpack

CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_ANSWER),  # decompressed, too
    # By default gRPC waits up to two minutes before it connects again to a restarted server.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # As over HTTP, the model server is never reached through the environment's http_proxy.
    ("grpc.enable_http_proxy", 0),
]
TOO_LARGE = re.compile("(CLIENT: Received|Decompressed) message larger than max")  # an answer
# gRPC reports UNAVAILABLE when a server accepts a connection and then is silent for a second.
# All clients of the process share connections, so all of them see it.
SILENT = re.compile("timed out|timeout|handshaker shutdown", re.IGNORECASE)


def encode(model: str, version: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Any:
    """Encode an inference as a message; the arguments are those of a `Request`."""
    message = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=DATATYPES[array.dtype], shape=array.shape)
        message.raw_input_contents.append(pack(array))
    for name in outputs:
        message.outputs.add(name=name)
    return message


def decode(message: Any) -> Reply:
    """Decode the answer to an inference; raises `ValueError` or `KeyError` if it is broken."""
    outputs = {
        output.name: unpack(data, output.datatype, output.shape)
        for output, data in zip(message.outputs, message.raw_output_contents, strict=True)
    }
    return Reply(int(message.model_version), outputs)


class GrpcTransport:
    def __init__(self, url: ServerURL, api_key: str | None = None) -> None:
        self._url = url
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = (
            grpc.secure_channel(url.address, grpc.ssl_channel_credentials(), CHANNEL)
            if url.secure
            else grpc.insecure_channel(url.address, CHANNEL)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def send(self, request: Request, timeout: float) -> Any:
        options = {"timeout": timeout, "metadata": self._metadata}
        model = {"name": request.model, "version": request.version}
        try:
            if request.action == "infer":
                message = encode(request.model, request.version, request.inputs, request.outputs)
                answer = self._stub.ModelInfer(message, **options)
                with reading(self._url):
                    return decode(answer)
            if request.action == "config":
                asked = service_pb2.ModelConfigRequest(**model)
                parameters = self._stub.ModelConfig(asked, **options).config.parameters
                texts = {
                    name: {"string_value": value.string_value} for name, value in parameters.items()
                }
                return {"parameters": texts}
            if request.action == "ready":
                return self._stub.ModelReady(
                    service_pb2.ModelReadyRequest(**model), **options
                ).ready
        except grpc.RpcError as error:
            raise self._error(error.code().name, error.details() or "", timeout) from error
        raise InvalidRequest(f"gRPC has no call for {request.action}")

    def _error(self, status: str, text: str, timeout: float) -> RAdapterClientError:
        if status == "DEADLINE_EXCEEDED":
            return Timeout(f"no answer from {self._url} within {timeout:g} s")
        if TOO_LARGE.search(text):
            return ServerError(f"the server's answer has more than {MAX_ANSWER:,} bytes")
        reported = from_server(status, text)
        # A server that stops cancels its open requests. A status with a code comes from a task or
        # from Triton, not from gRPC itself.
        if status not in ("UNAVAILABLE", "CANCELLED") or reported.code is not None:
            return reported
        kind = Timeout if SILENT.search(text) else ServerUnavailable
        return kind(
            f"no answer from {self._url}: {text}; is the server running (radapter-serve)? With"
            " --engine process, and behind radapter-gateway, it answers only http://"
        )

    def close(self) -> None:
        self._channel.close()
