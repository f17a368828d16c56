"""What a model takes and gives, by its config.pbtxt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import model_config_pb2


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Args:
        datatype: as KServe names it, such as BYTES or FP32.
        dims: without the batch; -1 is any number.
        optional: whether a request may leave it out.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False


def tensors_of(described: Iterable[Any]) -> dict[str, Tensor]:
    """The inputs or the outputs of a `ModelConfig`, by name."""
    return {
        one.name: Tensor(
            one.name, datatype_of(one), tuple(one.dims), bool(getattr(one, "optional", False))
        )
        for one in described
    }


def datatype_of(tensor: Any) -> str:
    """The datatype of a config's tensor as KServe names it."""
    name = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else str(name)
