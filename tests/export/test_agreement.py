"""The agreement check lets nothing through that differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from radapter_export.references import Array, Inputs
from radapter_export.references import references as references_of
from radapter_serve.adapter import attach_adapter, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples, compare
from tests.export.conftest import GRAPHS, Exported


@pytest.fixture(scope="module")
def inputs(exported: Exported, tiny_base: Base) -> Inputs:
    folder, releases = exported
    path = folder / "repository" / "classify" / "1" / "tokenizer.json"
    return Inputs(tiny_base, Tokenizer.load(path, releases[0].facts["tokenizer"]), 32)


@pytest.fixture(scope="module")
def references(adapter_path: Path, inputs: Inputs, tiny_clip_dir: str) -> dict[str, list[Array]]:
    base = load_base(tiny_clip_dir)
    attach_adapter(base.model, load_adapter(adapter_path), 0.3, form="weight")
    return references_of(base, inputs, "naclip")


def test_samples_have_several_batches_and_lengths(inputs: Inputs) -> None:
    assert [len(tokens) for tokens in inputs.tokens] == [1, 2, 7]
    assert inputs.tokens[0].shape[1] < 77  # cropped
    assert inputs.tokens[1].shape[1] == inputs.tokens[2].shape[1] == 77
    for served, full in zip(inputs.tokens, inputs.full_tokens, strict=True):
        np.testing.assert_array_equal(served, full[:, : served.shape[1]])


@pytest.mark.parametrize("name", GRAPHS)
def test_a_folded_graph_agrees_with_attached_adapters_and_another_alpha_does_not(
    name: str, exported: Exported, inputs: Inputs, references: dict[str, list[Array]]
) -> None:
    """Adapters attached in weight form here; the export itself attaches them to activations."""
    folder = exported[0] / "repository" / name
    samples = Samples(inputs.of(name), references[name])
    agreement = compare(name, EncoderGraph(folder / "1" / "model.onnx"), samples, 1e-5)
    assert 0 <= agreement.max_error < 2e-6
    assert 0.999999 < agreement.min_cosine < 1.000001
    with pytest.raises(RAdapterError, match=f"{name} differs from torch by up to .*--tolerance"):
        compare(name, EncoderGraph(folder / "2" / "model.onnx"), samples, 1e-4)
    # The samples beside the graph are enough to check it again.
    stored = compare(
        name, EncoderGraph(folder / "1" / "model.onnx"), Samples.load(folder / "1"), 1e-5
    )
    assert stored.max_error == exported[1][0].facts["agreement"][name]["max_error"]


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("image_encoder", "visual.transformer.resblocks.1.mlp.c_proj.bias"),
        ("patch_encoder", "visual.transformer.resblocks.1.attn.out_proj.bias"),
        ("text_encoder", "transformer.resblocks.0.attn.out_proj.bias"),
    ],
)
def test_one_changed_weight_is_refused(
    name: str,
    weight: str,
    exported: Exported,
    inputs: Inputs,
    references: dict[str, list[Array]],
    tmp_path: Path,
) -> None:
    for value, message in ((3.0, "differs"), (float("nan"), "not finite")):
        model = onnx.load(exported[0] / "repository" / name / "1" / "model.onnx")
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] = value
        tensor.CopyFrom(numpy_helper.from_array(array, weight))
        onnx.save(model, tmp_path / "model.onnx")
        encoder = EncoderGraph(tmp_path / "model.onnx")
        with pytest.raises(RAdapterError, match=message):
            compare(name, encoder, Samples(inputs.of(name), references[name]), 1e-4)
