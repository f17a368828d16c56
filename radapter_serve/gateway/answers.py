"""From Triton's answer to a body: JSON, followed by binary tensors where the caller asked for
them.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from radapter_serve.gateway.requests import HEADER_LENGTH, Inference, check_fits_json, no_text


def write(answer: service_pb2.ModelInferResponse, asked: Inference) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers.

    Raises:
        Refused: an output is too large for JSON, or is no text.
    """
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for output, values in zip(answer.outputs, answer.raw_output_contents, strict=True):
        described = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if output.name in asked.binary:
            parts.append(values)
            outputs.append({**described, "parameters": {"binary_data_size": len(values)}})
        else:
            outputs.append({**described, "data": _to_json(output, values)})
    head: dict[str, Any] = {"id": asked.id} if asked.id else {}
    head |= {
        "model_name": answer.model_name,
        "model_version": answer.model_version,
        "outputs": outputs,
    }
    text = json.dumps(head, allow_nan=False, separators=(",", ":")).encode()
    if not asked.binary:
        return text, {"Content-Type": "application/json"}
    return b"".join([text, *parts]), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(text)),
    }


def _to_json(output: service_pb2.ModelInferResponse.InferOutputTensor, values: bytes) -> list[Any]:
    count = math.prod(output.shape)
    check_fits_json(output.name, count)
    if output.datatype != "BYTES":
        return np.frombuffer(values, triton_to_np_dtype(output.datatype)).tolist()  # type: ignore[no-any-return]
    texts = []
    offset = 0
    try:
        for _ in range(count):
            (length,) = struct.unpack_from("<I", values, offset)
            offset += 4 + length
            texts.append(values[offset - length : offset].decode())
    except UnicodeDecodeError:
        raise no_text(output.name) from None
    return texts
