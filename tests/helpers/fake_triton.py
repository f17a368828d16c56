"""A stand-in for Triton's Python module, so that a test chooses which requests share a batch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name = name
        self.array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError(str):
    code: str
    INTERNAL = "INTERNAL"
    INVALID_ARG = "INVALID_ARG"
    CANCELLED = "CANCELLED"
    UNAVAILABLE = "UNAVAILABLE"

    def __new__(cls, text: str, code: str) -> TritonError:
        self = super().__new__(cls, text)
        self.code = code
        return self

    def message(self) -> str:
        return str(self)


class Response:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self._tensors = output_tensors
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error

    def outputs(self) -> dict[str, np.ndarray]:
        assert self._error is None, self._error
        return {tensor.name(): tensor.array for tensor in self._tensors}


class Request:
    """A caller's request: arrays by name."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {
            name: value if isinstance(value, np.ndarray) else np.array(value, np.object_)
            for name, value in arrays.items()
        }

    def requested_output_names(self) -> list[str]:
        return []

    def is_cancelled(self) -> bool:
        return False

    def timeout(self) -> int:
        return 0


def by_name(owner: Request | Response, name: str) -> Tensor | None:
    if isinstance(owner, Response):
        return Tensor(name, owner.outputs()[name])
    return Tensor(name, owner.arrays[name]) if name in owner.arrays else None


def install(
    monkeypatch: pytest.MonkeyPatch,
    encode: Callable[[str, list[np.ndarray]], Response] | None = None,
) -> None:
    """Put the stand-in where models import it from; `encode` answers requests to another model, by
    its name and its inputs.
    """

    def request(model_name: str, inputs: list[Tensor], **_: Any) -> SimpleNamespace:
        assert encode is not None, f"{model_name} was asked"
        return SimpleNamespace(exec=lambda: encode(model_name, [tensor.array for tensor in inputs]))

    stand_in = SimpleNamespace(
        triton_string_to_numpy=lambda _: np.float32,
        get_input_tensor_by_name=by_name,
        get_output_tensor_by_name=by_name,
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=Response,
        InferenceRequest=request,
        PreferredMemory=lambda *_: None,
        TRITONSERVER_MEMORY_CPU=0,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    for name in [name for name in sys.modules if name.startswith("radapter_serve.triton.")]:
        monkeypatch.delitem(sys.modules, name)


def load(path: Path) -> Any:
    """The model of a model.py, imported as Triton does."""
    spec = importlib.util.spec_from_file_location("model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()
