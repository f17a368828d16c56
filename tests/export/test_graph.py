"""The graphs against torch, and what must not depend on weights."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import open_clip
import pytest
import torch

from radapter_export import graph
from radapter_export.graph import (
    EXTERNAL_ABOVE,
    Attention,
    Graph,
    image_graph,
    patch_graph,
    text_graph,
)
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_patches, normalised
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from tests.export.conftest import GRAPHS, Exported

TEXTS = ["a photo of a cat", "hello", "", "many words " * 100, "a dog, in the rain", "x y z", "7"]


def photos(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("key_width", [None, 24])
@torch.no_grad()
def test_attention_to_other_keys_gives_what_torch_gives(key_width: int | None) -> None:
    """Each of query, key and value has weights and biases of its own."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, kdim=key_width, vdim=key_width, batch_first=True)
    for parameter in attention.parameters():
        parameter.normal_()
    query = torch.randn(2, 5, 32)
    key = torch.randn(2, 7, key_width or 32)
    expected, _ = attention(query, key, key, need_weights=False)
    actual, _ = Attention(attention)(query, key, key)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_patch_graph_of_maskclip_gives_what_torch_gives(
    tiny_base: Base, tmp_path: Path
) -> None:
    """Each export of naclip compares the graph of that method."""
    path = tmp_path / "model.onnx"
    patch_graph(tiny_base, "maskclip").save(tiny_base.model.state_dict(), path)
    for batch in (1, 2, 7):
        pixels = normalised(photos(batch), tiny_base.preprocess, "cpu")
        expected = encode_patches(tiny_base.model, pixels, "maskclip")
        np.testing.assert_allclose(EncoderGraph(path)(photos(batch)), expected, atol=2e-6)


def custom_base(tiny_base: Base) -> Base:
    """The tiny CLIP in open_clip's other class, with an `eos` pool and a projection with bias."""
    config = dict(tiny_base.config)
    text = {**config.pop("text_cfg"), "pool_type": "eos", "eos_id": 49407, "proj_bias": True}
    torch.manual_seed(3)
    model = open_clip.CustomTextCLIP(text_cfg=text, **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return dataclasses.replace(tiny_base, config={**config, "text_cfg": text}, model=model)


@pytest.mark.parametrize("kind", ["CLIP", pytest.param("CustomTextCLIP", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_text_graph_gives_what_open_clip_gives_at_every_length(
    kind: str, tiny_base: Base, tmp_path: Path
) -> None:
    base = tiny_base if kind == "CLIP" else custom_base(tiny_base)
    graph = text_graph(base)
    model: Any = base.model
    assert type(model).__name__ == kind
    graph.save(model.state_dict(), tmp_path / "model.onnx")
    tokens = base.tokenizer(TEXTS)
    expected = model.encode_text(tokens, normalize=True).numpy()
    encoder = EncoderGraph(tmp_path / "model.onnx")
    for rows in ([0], [3], [1, 2], [0, 1, 2, 4, 5, 6], list(range(7))):
        ends = (tokens[rows] == 49407).int().argmax(1)
        for length in {int(ends.max()) + 1, 77}:
            embeds = encoder(tokens[rows, :length].numpy().astype(np.int32))
            np.testing.assert_allclose(embeds, expected[rows], atol=2e-6)


@pytest.mark.slow
def test_a_graph_does_not_depend_on_weights_and_leaves_them(
    tiny_clip_dir: str, graphs: dict[str, Graph], tmp_path: Path
) -> None:
    """torch's exporter by itself drops zero biases and merges equal tensors."""
    base = load_base(tiny_clip_dir)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    structure = repr(base.model)
    image_graph(base).save(base.model.state_dict(), tmp_path / "model.onnx")
    graphs["image_encoder"].save(base.model.state_dict(), tmp_path / "expected.onnx")
    graph, expected = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("model", "expected"))
    assert [node.op_type for node in graph.node] == [node.op_type for node in expected.node]
    stored = {tensor.name for tensor in graph.initializer}
    assert stored == set(graphs["image_encoder"].model.graph.initializers)
    assert repr(base.model) == structure
    assert not any(isinstance(module, Attention) for module in base.model.modules())
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())


@pytest.mark.parametrize("name", GRAPHS)
def test_files_are_plain_onnx_without_traces_of_this_machine(name: str, exported: Exported) -> None:
    path = exported[0] / "repository" / name / "1" / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 22)]
    assert not model.functions
    assert b".py" not in path.read_bytes()


def test_a_graph_takes_other_weights_and_large_ones_go_beside_it(
    tiny_base: Base, graphs: dict[str, Graph], tmp_path: Path
) -> None:
    assert EXTERNAL_ABOVE < 350e6  # a ViT-B-32, which one file would take seconds for
    graph = graphs["image_encoder"]
    weights = tiny_base.model.state_dict()
    first, second, third, large = (tmp_path / f"{n}.onnx" for n in range(4))
    graph.save(weights, first)
    graph.save({key: value * 2 for key, value in weights.items()}, second)
    graph.save(weights, third)
    assert first.read_bytes() == third.read_bytes() != second.read_bytes()
    size = graph.save(weights, large, external_above=1000)
    assert size == large.stat().st_size + (tmp_path / "3.onnx.data").stat().st_size
    np.testing.assert_array_equal(EncoderGraph(large)(photos(3)), EncoderGraph(first)(photos(3)))


@pytest.mark.slow
def test_a_model_that_the_exporter_fails_on_is_refused_in_one_line(tiny_base: Base) -> None:
    class Undecided(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1) if pixels.sum() > 0 else pixels.flatten(1) * 2

    model = copy.copy(tiny_base.model)
    model._modules = {**model._modules, "visual": Undecided()}
    with pytest.raises(RAdapterError, match=r"cannot export image_encoder of this model: .+") as e:
        image_graph(dataclasses.replace(tiny_base, model=model))
    assert "\n" not in str(e.value)


@torch.no_grad()
def test_a_graph_is_kept_for_every_base_of_its_architecture(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken one is made again, and where nothing can be kept each is made."""
    folder = tmp_path / "cache" / "graphs"
    traced: list[str] = []
    trace = graph._trace

    def counted(name: str, *arguments: Any) -> Any:
        traced.append(name)
        if len(traced) > 1:  # torch takes seconds
            return onnx_ir.load(tmp_path / "first.onnx")
        model = trace(name, *arguments)
        onnx_ir.save(model, tmp_path / "first.onnx")
        return model

    monkeypatch.setattr(graph, "_trace", counted)
    monkeypatch.setenv("RADAPTER_CACHE", str(folder.parent))

    def answers(base: Base) -> None:
        model: Any = base.model
        text_graph(base).save(model.state_dict(), tmp_path / "model.onnx")
        tokens = base.tokenizer(TEXTS)
        expected = model.encode_text(tokens, normalize=True).numpy()
        actual = EncoderGraph(tmp_path / "model.onnx")(tokens.numpy().astype(np.int32))
        np.testing.assert_allclose(actual, expected, atol=2e-6)

    other = copy.deepcopy(tiny_base)
    for parameter in other.model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    answers(tiny_base)
    answers(other)
    assert traced == ["text_encoder"]
    [kept] = folder.glob("*/*.onnx")
    assert kept.stat().st_size < 100_000  # without weights

    kept.write_bytes(kept.read_bytes()[:1000])
    answers(other)
    assert traced == ["text_encoder"] * 2
    answers(tiny_base)
    assert len(traced) == 2

    image_graph(tiny_base)
    quick = dataclasses.replace(tiny_base, config={**tiny_base.config, "quick_gelu": False})
    text_graph(quick)
    assert len(traced) == 4 and len(list(folder.glob("*/*.onnx"))) == 3
    monkeypatch.setattr(graph, "MOST_KEPT", 2)
    kept.unlink()
    answers(tiny_base)
    assert kept.is_file() and len(list(folder.glob("*/*.onnx"))) == 2

    monkeypatch.setenv("RADAPTER_CACHE", "/dev/null/cache")
    answers(tiny_base)
    assert len(traced) == 6
