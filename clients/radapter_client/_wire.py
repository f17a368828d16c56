"""One request to the server, whatever the protocol; the wire formats themselves are tritonclient's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Request:
    """One round trip.

    Args:
        action: "infer" is answered by Tensors, "config" and "statistics" by a dict as JSON has it, "ready" by a bool.
        model: name; empty for the statistics of all models.
        version: of the model; empty for the newest.
        inputs: name to array, with the batch first where the model has one; object arrays of bytes become BYTES.
        outputs: names of the outputs to compute and send; none for all of them.
    """

    action: Literal["infer", "config", "ready", "statistics"]
    model: str
    version: str = ""
    inputs: Mapping[str, Array] = field(default_factory=dict)
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Tensors:
    """The outputs of an inference, and the version of the model that gave them."""

    version: int
    outputs: dict[str, Array]


class Transport(Protocol):
    """Sends requests from any thread; raises nothing but RAdapterClientError."""

    def send(self, request: Request, timeout: float) -> Any: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """The same, in one event loop."""

    async def send(self, request: Request, timeout: float) -> Any: ...

    async def close(self) -> None: ...


def text_array(rows: Sequence[Sequence[bytes]]) -> Array:
    """Rows of byte strings as the object array [N, M] that tritonclient takes for BYTES."""
    array = np.empty((len(rows), len(rows[0])), np.object_)
    for index, row in enumerate(rows):
        array[index] = row
    return array


def bytes_array(items: Sequence[bytes]) -> Array:
    """Byte strings as the object array [N] that tritonclient takes for BYTES."""
    return text_array([items]).reshape(-1)


def infer_inputs(module: Any, inputs: Mapping[str, Array]) -> list[Any]:
    """The inputs in the words of tritonclient.grpc or tritonclient.http, given as `module`."""
    tensors = []
    for name, array in inputs.items():
        tensor = module.InferInput(name, list(array.shape), module.np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors
