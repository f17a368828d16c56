"""How tests ask a served model: tensors over gRPC, and plain JSON over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import np_to_triton_dtype

from radapter_serve.server.triton_server import TritonServer


def connect(server: TritonServer) -> grpc.InferenceServerClient:
    return grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))


def tensor(name: str, value: Any) -> grpc.InferInput:
    """An array as it is, a list (of lists) of texts, or one text or number as a list of one."""
    if not isinstance(value, np.ndarray):
        kind = {int: np.int32, float: np.float32}.get(type(value), object)
        value = np.array(value if isinstance(value, list) else [value], kind)
    made = grpc.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
    made.set_data_from_numpy(value)
    return made


def tensors(**values: Any) -> list[grpc.InferInput]:
    return [tensor(name, value) for name, value in values.items()]


def post(server: TritonServer, path: str, body: Any) -> tuple[int, Any]:
    """Status and answer of JSON sent to a path below /v2."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{server.http_url}/v2/{path}", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
