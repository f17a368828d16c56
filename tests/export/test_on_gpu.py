"""Engines and ONNX Runtime on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.plans import PLAN, build_engines, check_plan
from radapter_serve.encoders.tensorrt import Stream, TensorRTEngine, build, find_gpu
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import TOLERANCES, Samples, compare

pytestmark = pytest.mark.gpu
ENCODERS = ("image_encoder", "text_encoder")
FP32 = TOLERANCES["fp32"]  # which TF32 would miss


@pytest.fixture
def repository(exported_tiny_clip: Path, tmp_path: Path) -> Path:
    for model in ENCODERS:
        shutil.copytree(
            exported_tiny_clip / "model_repository" / model, tmp_path / "repository" / model
        )
    return tmp_path / "repository"


def agrees(name: str, encode: Callable[..., NDArray[np.float32]], folder: Path) -> None:
    compare(name, encode, Samples.load(folder), FP32)


def test_the_gpu_is_found_and_keeps_what_it_is_given() -> None:
    torch = pytest.importorskip("torch")
    gpu = find_gpu()
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.compute_capability == ".".join(map(str, torch.cuda.get_device_capability(0)))
    array = np.random.default_rng(0).normal(size=(1000, 37)).astype(np.float32)
    with Stream() as stream:
        np.testing.assert_array_equal(
            stream.download(stream.upload(array), array.shape, array.dtype), array
        )


def test_engines_agree_with_torch_and_are_refused_on_another_machine(repository: Path) -> None:
    pytest.importorskip("tensorrt")
    engines = build_engines(repository)
    assert len(engines) == 4
    for engine in engines:
        assert engine.agreement.max_error < FP32.max_error
        folder = repository / engine.model / str(engine.version)
        agrees(engine.model, EncoderGraph(folder / PLAN, "tensorrt"), folder)
        replace(check_plan(folder), compute_capability="1.0").save(folder)
        with pytest.raises(RAdapterError, match="compute capability 1.0"):
            check_plan(folder)


@pytest.mark.parametrize("model", ENCODERS)
def test_the_rtx_edition_agrees_with_torch(repository: Path, model: str) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx")
    find_gpu()
    folder = repository / model / "1"
    plan = build(trt, folder / "model.onnx", max_batch_size=8, max_length=77)
    agrees(model, TensorRTEngine(trt, plan), folder)


@pytest.mark.parametrize("model", ENCODERS)
def test_onnxruntime_on_the_gpu_agrees_with_torch(repository: Path, model: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime without CUDA")
    folder = repository / model / "1"
    agrees(model, EncoderGraph(folder / "model.onnx", device=0), folder)
