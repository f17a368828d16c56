"""The agreement check lets nothing through that differs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from radapter_export import ExportedRelease
from radapter_export.graph import Graph
from radapter_export.references import BATCHES, Array, Inputs
from radapter_export.references import references as references_of
from radapter_serve.adapter import attach_adapter, fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import TOLERANCES, Agreement, Samples, Tolerance, compare

References = dict[str, list[Array]]


@pytest.fixture(scope="module")
def inputs(exported: tuple[Path, list[ExportedRelease]], tiny_base: Base) -> Inputs:
    folder, releases = exported
    path = folder / "repository" / "classify" / "1" / "tokenizer.json"
    return Inputs(tiny_base, Tokenizer.load(path, releases[0].facts["tokenizer"]), 32)


@pytest.fixture(scope="module")
def references(adapter_path: Path, inputs: Inputs, tiny_clip_dir: str) -> References:
    base = load_base(tiny_clip_dir)
    attach_adapter(base.model, load_adapter(adapter_path), 0.3, form="weight")
    return references_of(base, inputs, "naclip")


def model_file(exported: tuple[Path, list[ExportedRelease]], name: str) -> Path:
    return exported[0] / "repository" / name / "1" / "model.onnx"


def test_samples_have_several_batches_and_lengths(inputs: Inputs, tiny_base: Base) -> None:
    assert (
        [len(image) for image in inputs.images]
        == [len(t) for t in inputs.tokens]
        == list(BATCHES)
        == [1, 2, 7]
    )
    assert inputs.tokens[0].shape[1] < 77  # cropped
    assert inputs.tokens[1].shape[1] == inputs.tokens[2].shape[1] == 77
    ends = [(tokens == 49407).int().argmax(1).tolist() for tokens in inputs.full_tokens]
    assert len({end for row in ends for end in row}) >= 5
    for served, full in zip(inputs.tokens, inputs.full_tokens, strict=True):
        np.testing.assert_array_equal(served, full[:, : served.shape[1]])


@pytest.mark.parametrize("name", ["image_encoder", "patch_encoder", "text_encoder"])
def test_folded_graph_agrees_with_attached_adapters(
    name: str, exported: tuple[Path, list[ExportedRelease]], inputs: Inputs, references: References
) -> None:
    """Adapters attached in weight form here; the export itself attaches them to activations."""
    encoder = EncoderGraph(model_file(exported, name))
    agreement = compare(name, encoder, Samples(inputs.of(name), references[name]), 1e-5)
    assert 0 <= agreement.max_error < 2e-6
    assert 0.999999 < agreement.min_cosine < 1.000001


@pytest.mark.parametrize("name", ["image_encoder", "patch_encoder", "text_encoder"])
def test_another_alpha_is_refused(
    name: str, exported: tuple[Path, list[ExportedRelease]], inputs: Inputs, references: References
) -> None:
    path = exported[0] / "repository" / name / "2" / "model.onnx"
    with pytest.raises(
        RAdapterError, match=f"{name} differs from torch by up to .*cosine.*--tolerance"
    ):
        compare(name, EncoderGraph(path), Samples(inputs.of(name), references[name]), 1e-4)


def changed(path: Path, target: Path, name: str, value: float) -> Path:
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("image_encoder", "visual.transformer.resblocks.1.mlp.c_proj.bias"),
        ("patch_encoder", "visual.transformer.resblocks.1.attn.out_proj.bias"),
        ("text_encoder", "transformer.resblocks.0.attn.out_proj.bias"),
    ],
)
@pytest.mark.parametrize(("value", "message"), [(3.0, "differs"), (float("nan"), "not finite")])
def test_one_changed_weight_is_refused(
    name: str,
    weight: str,
    value: float,
    message: str,
    exported: tuple[Path, list[ExportedRelease]],
    inputs: Inputs,
    references: References,
    tmp_path: Path,
) -> None:
    path = changed(model_file(exported, name), tmp_path / "model.onnx", weight, value)
    with pytest.raises(RAdapterError, match=message):
        compare(name, EncoderGraph(path), Samples(inputs.of(name), references[name]), 1e-4)


def test_batch_that_does_not_run_is_said_with_its_shape(
    exported: tuple[Path, list[ExportedRelease]],
) -> None:
    encoder = EncoderGraph(model_file(exported, "image_encoder"))
    wrong = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(RAdapterError, match=r"fails on a batch of shape \(2, 16, 16, 3\)"):
        compare("image_encoder", encoder, Samples([wrong], [np.zeros((2, 32), np.float32)]), 1e-4)


def test_base_graph_agrees_at_alpha_0(
    tiny_base: Base, graphs: dict[str, Graph], inputs: Inputs, adapter_path: Path, tmp_path: Path
) -> None:
    weights = tiny_base.model.state_dict()
    folded = fold(weights, load_adapter(adapter_path), 0.0)
    assert all(torch.equal(value, weights[key]) for key, value in folded.items())
    graphs["image_encoder"].save(folded, tmp_path / "model.onnx")
    references = references_of(tiny_base, inputs)["image_encoder"]
    compare(
        "image_encoder",
        EncoderGraph(tmp_path / "model.onnx"),
        Samples(inputs.images, references),
        2e-6,
    )
    assert logging.getLogger("torch.onnx").level == logging.NOTSET


def test_samples_lie_beside_each_graph_so_that_anyone_can_check_it(
    exported: tuple[Path, list[ExportedRelease]],
) -> None:
    for name in ("image_encoder", "patch_encoder", "text_encoder"):
        path = model_file(exported, name)
        agreement = compare(name, EncoderGraph(path), Samples.load(path.parent), 1e-5)
        assert agreement.max_error == exported[1][0].facts["agreement"][name]["max_error"]
    with pytest.raises(RAdapterError, match=r"samples.npz.*radapter-export"):
        Samples.load(path.parents[1])


def agreement_of(
    embeds: np.ndarray, reference: np.ndarray, bounds: Tolerance | float | None
) -> Agreement:
    samples = Samples([np.zeros((len(reference), 1), np.uint8)], [reference.astype(np.float32)])
    return compare("graph", lambda values: embeds.astype(np.float32), samples, bounds)


def units(seed: int, width: int = 512) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(4, width))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("tolerance", [1e-4, 0.3, 1.0])
def test_unrelated_directions_never_pass_whatever_the_tolerance(
    precision: str, tolerance: float
) -> None:
    bounds = TOLERANCES[precision].widened(tolerance)
    one = units(0)
    other = units(1)
    assert np.abs(one - other).max() < 0.3  # by components alone, they are near
    with pytest.raises(
        RAdapterError,
        match=r"1 - cosine up to (1\.|9\.).*no --tolerance allows a cosine below 0\.9",
    ):
        agreement_of(one, other, bounds)


def test_a_zero_vector_agrees_with_nothing() -> None:
    embeds = units(0)
    embeds[2] = 0
    assert agreement_of(embeds, units(0), None).min_cosine == 0
    with pytest.raises(RAdapterError, match="no --tolerance allows"):
        agreement_of(embeds, units(0), TOLERANCES["int8"].widened(1))


def test_tolerance_widens_the_cosine_by_its_square_and_the_advice_suffices() -> None:
    own = TOLERANCES["fp32"]
    assert own.widened(1e-4) == own
    assert own.widened(1e-6).min_cosine == own.min_cosine
    assert 1 - own.widened(1e-3).min_cosine == pytest.approx(100 * (1 - own.min_cosine))
    assert own.widened(1.0).min_cosine == 0.9
    for size in (3e-4, 3e-3, 1e-2):
        near = units(0) + np.random.default_rng(2).normal(size=(4, 512)) * size
        with pytest.raises(RAdapterError, match="if you accept this, give --tolerance") as error:
            agreement_of(near, units(0), own)
        advice = float(str(error.value).rpartition(" ")[2])
        assert agreement_of(near, units(0), own.widened(advice)).max_error <= advice
