"""α as an input of the graphs, against float64 math and against graphs with α folded in."""

from __future__ import annotations

import dataclasses
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from onnx import load
from torch import nn
from tritonclient.grpc import model_config_pb2

from radapter_export import ExportedRelease
from radapter_export.graph import DynamicAlphaTower, Graph
from radapter_export.precision import quantize
from radapter_serve.adapter import (
    Adapter,
    Metadata,
    average_adapters,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import Base, load_base
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import TOLERANCES, Samples, Tolerance, compare
from radapter_serve.release.config import encoders_of
from radapter_serve.server.models import load_as_triton
from tests.export.conftest import GRAPHS, Export, Exported, exported_once

ALPHAS = np.array([[0], [0.25], [0.5], [1], [0.8], [0.25], [0]], np.float32)
TEXTS = ["a cat", "hello", "", "many words " * 100, "a drawing of a dog, in the rain", "x y", "7"]


def inputs_of(name: str, base: Base) -> np.ndarray:
    if name != "text_encoder":
        return np.random.default_rng(0).integers(0, 256, (len(ALPHAS), 32, 32, 3), dtype=np.uint8)
    return base.tokenizer(TEXTS).numpy().astype(np.int32)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_layer_computes_w_plus_alpha_f_w(rank: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    tensors = {"layer": torch.randn(4, 4)}
    if rank is not None:
        tensors = {"layer.up": torch.randn(4, rank), "layer.down": torch.randn(rank, 4)}
    adapter = Adapter(tensors, Metadata("x", "y", rank=rank))
    model = nn.Sequential(OrderedDict(model=nn.Sequential(OrderedDict(layer=layer))))
    tower = DynamicAlphaTower(model, adapter)
    x = torch.randn(3, 7, 5)
    alphas = torch.tensor([[0.0], [0.3], [1.0]])
    weight = layer.weight.detach().double()
    bias = layer.bias.detach().double()
    matrix = adapter.matrix("layer").double()
    embeds = tower(x, alphas)
    for row, alpha in enumerate((0.0, 0.3, 1.0)):
        expected = x[row].double() @ (weight + alpha * matrix @ weight).T
        expected += bias + alpha * matrix @ bias
        torch.testing.assert_close(embeds[row].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GRAPHS)
def test_each_row_is_what_the_fold_at_its_alpha_gives(
    name: str,
    graphs: dict[str, Graph],
    dynamic_graphs: dict[str, Graph],
    tiny_base: Base,
    adapter_path: Path,
    tmp_path: Path,
) -> None:
    base = tiny_base.model.state_dict()
    adapter = load_adapter(adapter_path)
    values = inputs_of(name, tiny_base)
    dynamic_graphs[name].save({**base, **adapter.tensors}, tmp_path / "dynamic.onnx")
    dynamic = EncoderGraph(tmp_path / "dynamic.onnx")
    embeds = dynamic(values, ALPHAS)
    expected = np.empty_like(embeds)
    for alpha in np.unique(ALPHAS):
        rows = ALPHAS[:, 0] == alpha
        graphs[name].save(fold(base, adapter, float(alpha)), tmp_path / "fixed.onnx")
        expected[rows] = EncoderGraph(tmp_path / "fixed.onnx")(values[rows])
    np.testing.assert_allclose(embeds, expected, atol=3e-6)
    assert np.abs(dynamic(values, ALPHAS[::-1].copy()) - expected).max() > 1e-3
    # Every weight keeps its name in the state dict or in the adapter file.
    stored = {tensor.name for tensor in load(tmp_path / "dynamic.onnx").graph.initializer}
    is_image = name != "text_encoder"
    wanted = {key for key in adapter.tensors if key.startswith("visual.") == is_image}
    if name == "patch_encoder":  # naclip leaves out the last block's feed-forward layer
        wanted.remove("visual.transformer.resblocks.1.mlp.c_proj")
    assert stored & set(adapter.tensors) == wanted


@pytest.fixture(scope="session")
def dynamic(common: Path, adapter_path: Path) -> tuple[Path, ExportedRelease]:
    """A model repository with one release that takes any α."""
    folder, [release] = exported_once(common, "any", adapter_path, "dynamic", dense="naclip")
    return folder / "repository", release


def test_the_release_says_that_alpha_is_an_input(
    dynamic: tuple[Path, ExportedRelease], exported: Exported
) -> None:
    repository, release = dynamic
    assert (release.alpha, release.facts["dynamic_alpha"]) == (0.5, True)
    assert exported[1][0].facts["dynamic_alpha"] is False
    for model in GRAPHS:
        text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
        _, alpha = text_format.Parse(text, model_config_pb2.ModelConfig()).input
        kind = (alpha.name, alpha.data_type, list(alpha.dims), alpha.optional)
        assert kind == ("alpha", model_config_pb2.TYPE_FP32, [1], False)


@pytest.mark.parametrize("name", GRAPHS)
def test_samples_hold_alphas_and_another_is_refused(
    name: str, dynamic: tuple[Path, ExportedRelease]
) -> None:
    folder = dynamic[0] / name / "1"
    samples = Samples.load(folder)
    encoder = EncoderGraph(folder / "model.onnx")
    alphas = np.concatenate([np.ravel(batch) for batch in samples.alphas])
    assert set(alphas.tolist()) == {0.0, 0.25, 0.5, 1.0}
    assert any(len(np.unique(batch)) > 2 for batch in samples.alphas)
    measured = dynamic[1].facts["agreement"][name]["max_error"]
    assert compare(name, encoder, samples, Tolerance(1e-5)).max_error == measured
    other = dataclasses.replace(samples, alphas=[1 - batch for batch in samples.alphas])
    with pytest.raises(RAdapterError, match=f"{name} differs from torch"):
        compare(name, encoder, other, TOLERANCES["fp32"])


def test_runtimes_and_int8_take_alpha(
    dynamic: tuple[Path, ExportedRelease], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    for encoder in encoders_of(dynamic[0]):
        graph = load_as_triton(encoder, 1, "openvino", 1)
        samples = Samples.load(encoder.folder / "1")
        assert compare(encoder.name, graph, samples, Tolerance(1e-5)).min_cosine > 1 - 1e-6
        text = encoder.configured("openvino", 1)
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        # The batch is a dimension of the tensor for this runtime.
        assert list(config.input[1].dims) == [-1, 1]
        shutil.copy(encoder.file(1, "onnxruntime"), tmp_path / "model.onnx")
        quantize(tmp_path / "model.onnx")
        for runtime in ("onnxruntime", "openvino"):
            quantized = EncoderGraph(tmp_path / "model.onnx", runtime, precision="int8", threads=1)
            assert compare(encoder.name, quantized, samples, TOLERANCES["int8"]).max_error > 1e-5


def test_a_soup_is_exported_as_the_average(
    export: Export,
    adapter_path: Path,
    random_adapter: Callable[..., Adapter],
    tiny_base: Base,
    tmp_path: Path,
) -> None:
    save_adapter(random_adapter(scale=0.02), tmp_path / "other.safetensors")
    paths = [adapter_path, tmp_path / "other.safetensors"]
    [release] = export(adapter=paths, weights=(0.75, 0.25))
    adapters = [load_adapter(path) for path in paths]
    assert release.facts["adapters"] == [
        {"digest": adapters[0].digest, "weight": 0.75},
        {"digest": adapters[1].digest, "weight": 0.25},
    ]
    expected = fold(tiny_base.model.state_dict(), average_adapters(adapters, [0.75, 0.25]), 0.5)
    merged = load_base(f"local-dir:{release.merged}").model.state_dict()
    torch.testing.assert_close(dict(merged), expected, atol=0, rtol=0)
