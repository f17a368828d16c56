"""TensorRT and a GPU for a machine without: an engine is the ONNX itself, run with ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import onnxruntime
import pytest

from radapter_export import release
from radapter_serve.encoders import plans, tensorrt
from radapter_serve.encoders.tensorrt import Gpu
from radapter_serve.errors import RAdapterError

GPU = Gpu("NVIDIA H100", "9.0")
VERSION = "11.4.0.106"


class TensorRTEngine:
    def __init__(self, trt: Any, plan: bytes) -> None:
        self._session = onnxruntime.InferenceSession(plan)
        self.inputs = [tensor.name for tensor in self._session.get_inputs()]
        self.outputs = [tensor.name for tensor in self._session.get_outputs()]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        [embeds] = self._session.run(None, dict(zip(self.inputs, inputs, strict=True)))
        return embeds


def build(trt: Any, path: Path, **options: Any) -> bytes:
    return path.read_bytes()


def install(
    monkeypatch: pytest.MonkeyPatch, *, gpu: Gpu | None = GPU, version: str | None = VERSION
) -> None:
    """Take their places, or those of a machine without a GPU or without TensorRT."""

    def refuse(why: str) -> NoReturn:
        raise RAdapterError(why)

    def find_gpu() -> Gpu:
        return gpu or refuse("no GPU: none here; radapter-serve --runtime onnxruntime")

    def import_tensorrt() -> Any:
        if version is None:
            refuse("TensorRT is not installed for Python")
        return SimpleNamespace(__version__=version)

    for module in (tensorrt, plans, release):
        for fake in (find_gpu, import_tensorrt, build, TensorRTEngine):
            monkeypatch.setattr(module, fake.__name__, fake, raising=False)
