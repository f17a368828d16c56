"""From a model's reply to a body: JSON, followed by binary tensors where the caller asked for
them.
"""

from __future__ import annotations

import json
import struct
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_client import Reply
from radapter_serve.gateway.requests import HEADER_LENGTH, Inference, check_fits_json, no_text
from radapter_serve.release.tensors import NUMPY

_DATATYPES = {np.dtype(kind): name for name, kind in NUMPY.items()}


def write(reply: Reply, asked: Inference) -> tuple[bytes, dict[str, str]]:
    """The body of an answer and its headers.

    Raises:
        Refused: an output is too large for JSON, or is no text.
    """
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in reply.outputs.items():
        output: dict[str, Any] = {
            "name": name,
            "datatype": _DATATYPES[array.dtype],
            "shape": list(array.shape),
        }
        if name in asked.binary:
            parts.append(pack(array))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = _to_json(name, array)
        outputs.append(output)
    head: dict[str, Any] = {"id": asked.id} if asked.id else {}
    head |= {
        "model_name": asked.model,
        "model_version": str(reply.version),
        "outputs": outputs,
    }
    text = json.dumps(head, allow_nan=False, separators=(",", ":")).encode()
    if not asked.binary:
        return text, {"Content-Type": "application/json"}
    return b"".join([text, *parts]), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(text)),
    }


def pack(array: NDArray[Any]) -> bytes:
    """The values of a tensor as KServe's binary form has them; texts and files each after their
    length.
    """
    if array.dtype != object:
        return np.ascontiguousarray(array).tobytes()
    values = [one.encode() if isinstance(one, str) else one for one in array.ravel()]
    return b"".join(chain.from_iterable((struct.pack("<I", len(one)), one) for one in values))


def _to_json(name: str, array: NDArray[Any]) -> list[Any]:
    check_fits_json(name, array.size)
    values: list[Any] = array.ravel().tolist()
    if array.dtype != object:
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise no_text(name) from None
