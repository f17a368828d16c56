"""Engines and the GPU's driver, on a fake of both; `tests/export/test_tensorrt.py` builds with the
real parser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from radapter_serve.encoders.tensorrt import Engine, Gpu, Options, Stream, build, find_gpu
from radapter_serve.errors import RAdapterError
from tests.helpers.fake_tensorrt import Driver, install
from tests.helpers.small_release import encoder

LIMITS: dict[str, Any] = {"max_batch_size": 8, "max_length": 77}


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def trt(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(monkeypatch, driver)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(encoder("image_encoder", np.random.default_rng(0)), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)


def run(path: Path, array: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: array})[0]


def facts(plan: bytes) -> dict[str, Any]:
    return json.loads(plan.partition(b"\n")[0])


def test_the_gpu_is_named_and_its_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(name="NVIDIA A100", capability="8.0"))
    assert find_gpu() == Gpu("NVIDIA A100", "8.0")
    for driver, why in (
        (None, r"no NVIDIA driver \(libcuda.so.1\)"),
        (Driver(init=100), "says CUDA_ERROR_NO_DEVICE"),
        (Driver(init=9999), "says error 9999"),
        (Driver(devices=0), "shows none"),
    ):
        install(monkeypatch, driver)
        with pytest.raises(
            RAdapterError, match=rf"no GPU: .*{why}.*; .*radapter-serve --runtime onnxruntime"
        ):
            find_gpu()


def test_a_full_gpu_is_one_line_and_leaves_nothing(driver: Driver, trt: Any) -> None:
    driver.budget = 100
    with (
        pytest.raises(
            RAdapterError, match=r"the GPU failed: cuMemAlloc_v2 says CUDA_ERROR_OUT_OF_MEMORY"
        ),
        Stream() as stream,
    ):
        stream.allocate(10)
        stream.allocate(1000)
    assert not driver.memory and not driver.contexts


def test_an_engine_gives_what_the_graph_gives(driver: Driver, trt: Any, graph: Path) -> None:
    plan, profile = build(trt, graph, Options(), **LIMITS)
    assert profile == {"image": ((1, 16, 16, 3), (8, 16, 16, 3), (8, 16, 16, 3))}
    engine = Engine(trt, plan)
    assert (engine.inputs, engine.outputs) == (["image"], ["image_embeds"])
    for batch in (1, 3, 8, 19):  # more than it takes at once, too
        embeds = engine(images(batch))
        assert embeds.dtype == np.float32
        np.testing.assert_array_equal(embeds, run(graph, images(batch)))
    assert not driver.memory and not driver.contexts


def test_a_timing_cache_is_kept_and_one_of_another_gpu_replaced(
    trt: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "caches" / "mine.timing"

    def kept(module: Any) -> Any:
        return facts(build(module, graph, Options(), **LIMITS, timing_cache=cache)[0])["cache"]

    assert (kept(trt), kept(trt)) == ("", "measured on NVIDIA H100")
    assert kept(install(monkeypatch, Driver(name="NVIDIA L4"))) == ""
    assert cache.read_bytes() == b"measured on NVIDIA L4"
    assert [path.name for path in cache.parent.iterdir()] == ["mine.timing"]


def test_graphs_that_tensorrt_cannot_read_are_explained(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match=r"TensorRT 11.4.0.106 cannot read .*none.onnx: "):
        build(trt, tmp_path / "none.onnx", Options(), **LIMITS)
    model = encoder("image_encoder", np.random.default_rng(0))
    quantize = onnx.helper.make_node(
        "DynamicQuantizeLinear", ["floats"], ["a", "b", "c"], name="quantize_7"
    )
    model.graph.node.insert(1, quantize)
    onnx.save(model, tmp_path / "int8.onnx")
    with pytest.raises(
        RAdapterError, match=r"DynamicQuantizeLinear quantize_7: unsupported; .*--calibration DATA"
    ):
        build(trt, tmp_path / "int8.onnx", Options(), **LIMITS)
