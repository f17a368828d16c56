"""TensorRT and a GPU for a machine without: an engine is the ONNX itself, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime
import pytest

from radapter_serve.encoders import plans, tensorrt
from radapter_serve.encoders.tensorrt import Gpu, Options, Profile, make_profile
from radapter_serve.errors import RAdapterError

GPU = Gpu("NVIDIA H100", "9.0")
VERSION = "11.4.0.106"


class Engine:
    def __init__(self, trt: Any, plan: bytes) -> None:
        self._session = onnxruntime.InferenceSession(plan)
        self.inputs = [tensor.name for tensor in self._session.get_inputs()]
        self.outputs = [tensor.name for tensor in self._session.get_outputs()]

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        [embeds] = self._session.run(None, dict(zip(self.inputs, inputs, strict=True)))
        return embeds


def build(
    trt: Any,
    path: Path,
    options: Options,
    *,
    max_batch_size: int,
    max_length: int,
    timing_cache: Path | None = None,
    progress: Any = None,
) -> tuple[bytes, Profile]:
    model = onnx.load(path)
    shapes = {
        tensor.name: tuple(dim.dim_value or -1 for dim in tensor.type.tensor_type.shape.dim)
        for tensor in model.graph.input
    }
    if timing_cache is not None:
        timing_cache.write_bytes(b"measured")
    batches = (options.opt_batch_size, max_batch_size)
    return model.SerializeToString(), make_profile(shapes, batches, (16, max_length))


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

    for module in (tensorrt, plans):
        for fake in (find_gpu, import_tensorrt, build, Engine):
            monkeypatch.setattr(module, fake.__name__, fake)
