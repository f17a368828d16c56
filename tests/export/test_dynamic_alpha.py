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
from torch import nn
from tritonclient.grpc import model_config_pb2

from radapter_export.graph import DynamicAlphaTower
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
from radapter_serve.clip.towers import TorchEncoder
from radapter_serve.contract.embeddings import map_embeddings
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import TOLERANCES, Samples, Tolerance, compare
from radapter_serve.release.config import encoders_of, read_config
from tests.export.conftest import GRAPHS, Export, Exported


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


def test_the_release_says_that_alpha_is_an_input(dynamic: Exported, exported: Exported) -> None:
    folder, [release] = dynamic
    assert (release.alpha, release.facts["dynamic_alpha"]) == (0.5, True)
    assert exported[1][0].facts["dynamic_alpha"] is False
    for model in GRAPHS:
        _, alpha = read_config(folder / "repository" / model / "config.pbtxt").input
        kind = (alpha.name, alpha.data_type, list(alpha.dims), alpha.optional)
        assert kind == ("alpha", model_config_pb2.TYPE_FP32, [1], False)


@pytest.mark.parametrize("name", GRAPHS)
def test_samples_hold_alphas_and_another_is_refused(name: str, dynamic: Exported) -> None:
    folder = dynamic[0] / "repository" / name / "1"
    samples = Samples.load(folder)
    encoder = EncoderGraph(folder / "model.onnx")
    alphas = np.concatenate([np.ravel(batch) for batch in samples.alphas])
    assert set(alphas.tolist()) == {0.0, 0.25, 0.5, 1.0}
    assert any(len(np.unique(batch)) > 2 for batch in samples.alphas)
    measured = dynamic[1][0].facts["agreement"][name]["max_error"]
    assert compare(name, encoder, samples, Tolerance(1e-5)).max_error == measured
    other = dataclasses.replace(samples, alphas=[1 - batch for batch in samples.alphas])
    with pytest.raises(RAdapterError, match=f"{name} differs from torch"):
        compare(name, encoder, other, TOLERANCES["fp32"])


def test_runtimes_and_int8_take_alpha(dynamic: Exported, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    image, _, text = encoders_of(dynamic[0] / "repository")
    for encoder in (image, text):
        path = encoder.folder / "1" / "model.onnx"
        graph = EncoderGraph(path, "openvino", threads=1)
        samples = Samples.load(encoder.folder / "1")
        assert compare(encoder.name, graph, samples, Tolerance(1e-5)).min_cosine > 1 - 1e-6
        config = text_format.Parse(
            encoder.configured("openvino", 1), model_config_pb2.ModelConfig()
        )
        # The batch is a dimension of the tensor for this runtime.
        assert list(config.input[1].dims) == [-1, 1]
        shutil.copy(path, tmp_path / "model.onnx")
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


@pytest.mark.parametrize(
    ("rank", "choice"),
    [(3, [0.4]), (3, "dynamic"), pytest.param(None, "dynamic", marks=pytest.mark.slow)],
)
def test_adapters_on_the_projections_are_exported_folded_and_at_any_alpha(
    rank: int | None,
    choice: list[float] | str,
    export: Export,
    random_adapter: Callable[..., Adapter],
    tiny_clip_dir: str,
    tmp_path: Path,
) -> None:
    """Images, patches and texts, against the map of the base's unit vectors; the next test has a
    fold of full rank.
    """
    path = tmp_path / "adapter.safetensors"
    adapter = random_adapter(adapt="projections", scale=0.1, rank=rank)
    save_adapter(adapter, path)
    base = load_base(tiny_clip_dir)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    torch_encoder = TorchEncoder(base.model, base.preprocess, "naclip")
    tokens = np.asarray(base.tokenizer(["a cat", "two dogs", ""]).numpy(), np.int32)
    alphas = np.array([[0.0], [0.4], [1.0]], np.float32)
    more = (alphas,) if choice == "dynamic" else ()
    export(choice, adapter=path, dense="naclip")
    loaded = load_release(tmp_path / "repository")
    for key, calls in (
        ("visual.proj", [("images", pixels), ("patches", pixels)]),
        ("text_projection", [("tokens", tokens)]),
    ):
        matrix = adapter.matrix(key).numpy()
        for name, rows in calls:
            plain = getattr(torch_encoder, name)(rows)
            served = getattr(loaded.encoder, name)(rows, *more)
            for row, (alpha,) in enumerate(alphas if more else [(0.4,)] * 3):
                vectors = plain[row].reshape(-1, plain.shape[-1])
                expected = map_embeddings(vectors, matrix, float(alpha))
                ours = served[row].reshape(expected.shape)
                np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "runtime", "choice"),
    [
        ("fp16", "onnxruntime", [0.4]),
        ("bf16", "openvino", "dynamic"),
        ("int8", "openvino", "dynamic"),
    ],
)
def test_a_projection_is_exported_in_each_precision(
    precision: str,
    runtime: str,
    choice: list[float] | str,
    export: Export,
    random_adapter: Callable[..., Adapter],
    tiny_clip_dir: str,
    tmp_path: Path,
) -> None:
    """Within the precision's own tolerance of the map of the base's unit vectors."""
    path = tmp_path / "adapter.safetensors"
    rank = 3 if choice == "dynamic" else None  # of the graphs that the test above makes
    adapter = random_adapter(adapt="projections", scale=0.3, rank=rank)
    save_adapter(adapter, path)
    export(choice, adapter=path, precision=precision, runtime=runtime)
    loaded = load_release(tmp_path / "repository")
    base = load_base(tiny_clip_dir)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    tokens = np.asarray(base.tokenizer(["a cat", "two dogs", ""]).numpy(), np.int32)
    torch_encoder = TorchEncoder(base.model, base.preprocess, None)
    alphas = (np.full((3, 1), 0.4, np.float32),) if choice == "dynamic" else ()
    for key, name, rows in (
        ("visual.proj", "images", pixels),
        ("text_projection", "tokens", tokens),
    ):
        plain = getattr(torch_encoder, name)(rows)
        expected = map_embeddings(plain, adapter.matrix(key).numpy(), 0.4)
        served = getattr(loaded.encoder, name)(rows, *alphas)
        least = TOLERANCES[precision].min_cosine
        assert (served * expected).sum(axis=1).min() >= least
        assert (plain * expected).sum(axis=1).min() < least
