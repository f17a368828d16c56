"""`Tensor`: what a model takes or gives, by KServe's names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "INT32": np.int32,
    "FP32": np.float32,
    "BYTES": np.object_,
}
DATATYPES = {np.dtype(kind): name for name, kind in NUMPY.items()}


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a model: its datatype as KServe names it, its dims without the
    batch, -1 for any number, and whether a request may leave it out.
    """

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
