"""Binary tensors of the KServe protocol, shared by the client and the gateway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NUMPY: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "INT32": np.int32,
    "FP32": np.float32,
    "BYTES": np.object_,
}
MAX_ANSWER = 256 * 2**20  # bytes of an answer; the mask of the largest image takes half
MAX_TEXTS = 2**22  # of a tensor; each is an object, even an empty one
DATATYPES = {np.dtype(kind): name for name, kind in NUMPY.items()}


def pack(array: Array) -> bytes:
    """Encode a tensor as bytes; each text or file is preceded by its length."""
    if array.dtype != object:
        return array.tobytes()
    parts: list[bytes] = []
    for value in array.ravel():
        data = value.encode() if isinstance(value, str) else value
        parts += (len(data).to_bytes(4, "little"), data)
    return b"".join(parts)


def unpack(data: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """Decode the bytes of `pack`; a `ValueError` or `KeyError` if they do not fit."""
    if datatype != "BYTES":
        return np.frombuffer(data, NUMPY[datatype]).reshape(shape)
    count = math.prod(shape)
    if count > MAX_TEXTS:
        raise ValueError(f"{count:,} texts; at most {MAX_TEXTS:,} are read")
    items = []
    end = 0
    for number in range(1, count + 1):  # reads no more values than the shape has
        start = end + 4
        size = int.from_bytes(data[end:start], "little")
        end = start + size
        if end > len(data):
            raise ValueError(f"value {number} of {count} goes beyond the end")
        items.append(bytes(data[start:end]))
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the {count} values")
    return np.array(items, object).reshape(shape)
