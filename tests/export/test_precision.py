"""Precision: which operators compute in which type, numbers where 16 bits overflow, int8, and what
the task loses.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from radapter_export import ExportedRelease, ExportSettings, export_release
from radapter_export.accuracy import Accuracy, Validation, open_validation
from radapter_export.graph import Graph
from radapter_export.precision import lower
from radapter_export.quantization import calibrate, calibration_images, quantize
from radapter_export.source import read_source
from radapter_export.tokenizer import ServedTokenizer
from radapter_serve.adapter import Adapter, attach_adapter, fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.data.rows import open_images
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.run import Scored
from radapter_serve.release.agreement import TOLERANCES, Samples, compare
from tests.export.conftest import CLASSES
from tests.helpers.a_row import a_row

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def types_of(path: Path) -> dict[str, set[int]]:
    """The types that each kind of operator gives, as ONNX's own inference finds them from the
    file's inputs.
    """
    model = onnx.load(path)
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in inferred.graph.output}
    found = defaultdict(set)
    for node in inferred.graph.node:
        found[node.op_type].add(kinds[node.output[0]])
    return found


@pytest.mark.parametrize("name", ["image_encoder", "patch_encoder", "text_encoder"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_are_low_and_what_overflows_is_fp32(
    graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path, precision: str, name: str
) -> None:
    graph = graphs[name]
    path = tmp_path / "model.onnx"
    before = {value.name: value.dtype for value in graph.model.graph.initializers.values()}
    lower(graph, precision).save(tiny_base.model.state_dict(), path)
    assert {value.name: value.dtype for value in graph.model.graph.initializers.values()} == before
    onnx.checker.check_model(str(path), full_check=True)
    found = types_of(path)
    assert found["MatMul"] == {LOW[precision]}
    assert found["Conv"] <= {LOW[precision]}
    for kind in ("LayerNormalization", "Softmax", "ReduceSum", "Sqrt"):
        assert found[kind] == {TensorProto.FLOAT}
    model = onnx.load(path)
    (taken,) = model.graph.input
    (given,) = model.graph.output
    assert taken.type.tensor_type.elem_type in (TensorProto.UINT8, TensorProto.INT32)
    assert given.type.tensor_type.elem_type == TensorProto.FLOAT
    made = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "Cast":
            source = made.get(node.input[0])
            assert source is None or source.op_type != "Cast", f"two casts in a row at {node.name}"
            users = [user.op_type for user in model.graph.node if node.output[0] in user.input]
            assert users
    state = tiny_base.model.state_dict()
    weights = {
        tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.name in state
    }
    assert set(weights) == {key for key in before if key in state}
    for key, kind in weights.items():
        if key.endswith("weight") and state[key].ndim >= 2:
            assert kind == LOW[precision], key
        if "ln_" in key:
            assert kind == TensorProto.FLOAT, key


NORM = """<ir_version: 10, opset_import: ["" : 22]>
norm (uint8[B, 8] image) => (float[B, 4] unit)
<float[8, 4] weight = {0}, float[4] gain = {0}, float[4, 4] square = {0},
 float two = {2}, float small = {1e-6},
 int64[1] last = {-1}> {
    x = Cast<to: int = 1>(image)
    y = MatMul(x, weight)
    mean = ReduceMean(y, last)
    centred = Sub(y, mean)
    squares = Pow(centred, two)
    variance = ReduceMean(squares, last)
    safe = Add(variance, small)
    deviation = Sqrt(safe)
    normal = Div(centred, deviation)
    scaled = Mul(normal, gain)
    z = MatMul(scaled, square)
    zz = Mul(z, z)
    total = ReduceSum(zz, last)
    length = Sqrt(total)
    unit = Div(z, length)
}"""

MASK = """<ir_version: 10, opset_import: ["" : 22]>
mask (uint8[B, 4] image) => (float[B, 4] mixed)
<float[4, 4] weight = {0}, float[4, 4] value = {0},
 float lowest = {-3.4028235e38}, float zero = {0},
 uint8 limit = {100}> {
    x = Cast<to: int = 1>(image)
    scores = MatMul(x, weight)
    hidden = Greater(image, limit)
    bias = Where(hidden, lowest, zero)
    moved = Identity(bias)
    masked = Add(scores, moved)
    share = Softmax(masked)
    mixed = MatMul(share, value)
}"""


def parsed(text: str, **weights: np.ndarray) -> tuple[Graph, dict[str, torch.Tensor]]:
    """A graph from ONNX's text form, and weights for it."""
    for name, array in weights.items():  # the text has to give each initializer some value
        text = text.replace(f"{name} = {{0}}", f"{name} = {{{', '.join(['0'] * array.size)}}}")
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.BOOL if node.op_type == "Greater" else ir.DataType.FLOAT
    for name in weights:
        model.graph.initializers[name].const_value = None
    return Graph("small", model, {}), {
        name: torch.from_numpy(array) for name, array in weights.items()
    }


def test_a_norm_written_out_is_right_where_fp16_overflows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "gain": random.normal(size=4).astype(np.float32),
        "square": random.normal(size=(4, 4)).astype(np.float32),
    }
    arrays["weight"] = random.normal(size=(8, 4)).astype(np.float32) * 4
    arrays["square"] *= 300
    graph, weights = parsed(NORM, **arrays)
    lower(graph, "fp16").save(weights, tmp_path / "model.onnx")
    image = random.integers(0, 256, (5, 8), dtype=np.uint8)
    rounded = {name: array.astype(np.float16).astype(np.float64) for name, array in arrays.items()}
    y = image.astype(np.float64) @ rounded["weight"]
    centred = y - y.mean(-1, keepdims=True)
    z = (
        centred
        / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        * arrays["gain"]
        @ rounded["square"]
    )
    assert (
        np.abs(centred).max() ** 2 > np.finfo(np.float16).max < np.abs(z).max() ** 2
    )  # what the test is about
    found = EncoderGraph(tmp_path / "model.onnx")(image)
    np.testing.assert_allclose(found, z / np.linalg.norm(z, axis=-1, keepdims=True), atol=3e-3)


def test_a_mask_beyond_fp16_hides_and_gives_no_nan(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        name: random.normal(size=(4, 4)).astype(np.float32) * 0.01 for name in ("weight", "value")
    }
    graph, weights = parsed(MASK, **arrays)
    lower(graph, "fp16").save(weights, tmp_path / "model.onnx")
    image = np.array([[1, 2, 200, 3], [255, 255, 255, 255], [9, 8, 7, 6]], np.uint8)
    scores = image.astype(np.float64) @ arrays["weight"]
    shares = np.exp(scores) * (image <= 100)
    shares[1] = 1  # all hidden: all alike, where minus infinity would give NaN
    shares = shares / shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        EncoderGraph(tmp_path / "model.onnx")(image), shares @ arrays["value"], atol=1e-4
    )


SHARES = """<ir_version: 10, opset_import: ["" : 22]>
shares (uint8[B, 64] image) => (float[B, 2] twice)
<float[64, 64] weight = {0}, float[64, 2] value = {0}, float two = {2}, int64[1] last = {-1}> {
    x = Cast<to: int = 1>(image)
    y = MatMul(x, weight)
    total = ReduceSum(y, last)
    share = Div(y, total)
    mixed = MatMul(share, value)
    twice = Mul(mixed, two)
}"""


def test_a_sum_is_right_beyond_fp16_whatever_takes_it(tmp_path: Path) -> None:
    """64 values of some 4,000 each; what divides by their sum and multiplies may be in 16 bits.

    ONNX's own interpreter does in 16 bits what the graph says; ONNX Runtime's CPU takes 32.
    """
    random = np.random.default_rng(0)
    weight = random.uniform(0.3, 0.7, (64, 64)).astype(np.float32)
    value = random.normal(size=(64, 2)).astype(np.float32)
    graph, weights = parsed(SHARES, weight=weight, value=value)
    lower(graph, "fp16").save(weights, tmp_path / "model.onnx")
    image = random.integers(100, 150, (5, 64), dtype=np.uint8)
    y = image.astype(np.float64) @ weight
    assert y.max() < np.finfo(np.float16).max < y.sum(-1).min()  # what the test is about
    expected = 2 * (y / y.sum(-1, keepdims=True) @ value)
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "model.onnx"))
    results: Any = evaluator.run(None, {"image": image})
    found = results[0]
    np.testing.assert_allclose(found, expected, atol=2e-3)


PRODUCT = """<ir_version: 10, opset_import: ["" : 20]>
product (float[B, 64] x) => (float[B, 2] y) <float[64, 2] weight = {0}> { y = MatMul(x, weight) }"""


@pytest.mark.parametrize("static", [False, True])
def test_int8_adds_up_large_values_right_on_every_cpu(tmp_path: Path, static: bool) -> None:
    """Pairs of products of 8 bits with 8 bits, all as large as can be, do not fit into the 16 that
    some CPUs add in.
    """
    weight = np.ones((64, 2), np.float32)
    weight[:, 1] = 0.5
    graph, weights = parsed(PRODUCT, weight=weight)
    graph.save(weights, path := tmp_path / "model.onnx")
    x = np.linspace(0.9, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    quantize(path, [x] if static else ())
    np.testing.assert_allclose(EncoderGraph(path)(x), x @ weight, rtol=0.02)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


@pytest.mark.parametrize("static", [False, True])
def test_int8_gives_each_column_of_weights_a_range_of_its_own(tmp_path: Path, static: bool) -> None:
    """One of a thousandth of the other's size would be nothing in steps of the other's."""
    weight = np.random.default_rng(0).uniform(0.5, 1, (64, 2)).astype(np.float32)
    weight[:, 1] *= 1e-3
    graph, weights = parsed(PRODUCT, weight=weight)
    graph.save(weights, path := tmp_path / "model.onnx")
    x = np.linspace(0.1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    quantize(path, [x] if static else ())
    np.testing.assert_allclose(EncoderGraph(path)(x), x @ weight, rtol=0.02)


Export = Callable[..., ExportedRelease]


@pytest.fixture
def export(quick: None, adapter_path: Path, tmp_path: Path) -> Export:
    """One release of the tiny adapter in `tmp_path`."""

    def call(**changes: Any) -> ExportedRelease:
        where = {"model_repository": tmp_path / "repository", "merged": tmp_path / "merged"}
        (release,) = export_release(
            changes.pop("adapter", adapter_path), [0.7], ExportSettings(**{**where, **changes})
        )
        return release

    return call


def accuracy_of_torch(base: Base, adapter: Adapter, photos: Path) -> float:
    """Per cent right by open_clip's own code, the adapter folded in at 0.7, and the adapter's
    templates.
    """
    model: Any = load_base(base.name).model
    model.load_state_dict(fold(base.model.state_dict(), adapter, 0.7))
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    classes = sorted(CLASSES)
    hits = []
    with torch.no_grad():
        prompts = [
            [template.replace("{}", name) for template in adapter.metadata.templates]
            for name in classes
        ]
        means = torch.stack(
            [model.encode_text(base.tokenizer(texts), normalize=True).mean(0) for texts in prompts]
        )
        classifier = torch.nn.functional.normalize(means, dim=-1)
        for path in sorted(photos.rglob("*.png")):
            scores = model.encode_image(transform(Image.open(path))[None]) @ classifier.T
            hits.append(classes[int(scores.argmax())] == path.parent.name)
    return 100 * float(np.mean(hits))


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp16", {}),
        ("bf16", {"runtime": "openvino"}),
        ("int8", {}),
        ("int8", {"calibration": True}),
    ],
    ids=["fp16", "bf16", "int8 dynamic", "int8 static"],
)
def test_release_says_what_its_precision_costs(
    export: Export,
    adapter_path: Path,
    tiny_base: Base,
    photos: Path,
    tmp_path: Path,
    precision: str,
    changes: dict[str, Any],
) -> None:
    if changes.pop("calibration", False):
        changes["calibration"] = f"imagefolder:{photos}"
    if "runtime" in changes:
        pytest.importorskip("openvino")
    release = export(
        precision=precision,
        validation=f"imagefolder:{photos}",
        max_drop=100,
        dense="naclip",
        **changes,
    )
    facts = release.facts
    assert facts["precision"] == precision
    bounds = TOLERANCES[precision]
    for graph in release.graphs:
        # Coarser than fp32, so it is what it says; and as close as its precision allows.
        assert 1e-6 < graph.agreement.max_error <= bounds.max_error
        folder = tmp_path / "repository" / graph.name / "1"
        assert {path.name for path in folder.iterdir()} == {
            "config.pbtxt",
            "model.onnx",
            "samples.npz",
        }
        encoder = EncoderGraph(folder / "model.onnx", facts["runtime"], precision=precision)
        again = compare(graph.name, encoder, Samples.load(folder), bounds)
        assert again.max_error == pytest.approx(graph.agreement.max_error, rel=0.2)
    found = facts["accuracy"]
    assert found["torch"] == pytest.approx(
        accuracy_of_torch(tiny_base, load_adapter(adapter_path), photos), abs=0.01
    )
    assert found["drop"] == pytest.approx(found["torch"] - found["release"])
    assert (found["n"], found["metric"], found["dataset"]) == (30, "acc1", f"imagefolder:{photos}")
    written = tmp_path / "repository" / "classify" / "1" / "release.json"
    assert json.loads(written.read_text(encoding="utf-8")) == facts
    nodes = [
        node.op_type
        for node in onnx.load(
            tmp_path / "repository" / "image_encoder" / "1" / "model.onnx"
        ).graph.node
    ]
    if precision == "int8":
        assert facts["quantization"]["kind"] == (
            "static" if "calibration" in changes else "dynamic"
        )
        # Four products of weights in each of the two layers, and the last projection; the patches'
        # convolution is not.
        assert nodes.count("QuantizeLinear" if "calibration" in changes else "MatMulInteger") == 9
    else:
        assert "quantization" not in facts
    if "calibration" in changes:
        assert (facts["quantization"]["images"], facts["quantization"]["texts"]) == (30, 10)


def test_calibration_takes_images_of_all_of_a_folder(tmp_path: Path) -> None:
    for number in range(200):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
    images = open_images(str(tmp_path), "--calibration")
    batches = calibration_images(images, Preprocess.from_dict({"size": 4}))
    taken = np.concatenate(batches)[:, 0, 0, 0].astype(int)
    assert (len(taken), taken[0]) == (128, 0)
    assert set(np.diff([*taken, 200])) == {1, 2}


def test_digest_tells_apart_how_int8_was_made(exported: tuple[Path, list[ExportedRelease]]) -> None:
    fp32 = exported[1][0].release
    kinds = [
        {"kind": "dynamic"},
        {"kind": "static", "digest": "a"},
        {"kind": "static", "digest": "b"},
    ]
    int8 = [replace(fp32, precision="int8", quantization=kind) for kind in kinds]
    dynamic = replace(int8[0], dynamic_alpha=True)
    assert len({one.digest for one in (fp32, *int8, dynamic)}) == 5


Calibrate = Callable[[str], list[list[int]]]


@pytest.fixture
def calibrated(tiny_base: Base, adapter_path: Path, photos: Path, tmp_path: Path) -> Calibrate:
    """The texts that calibrate where there is one label set, as open_clip's tokens."""

    def call(labels: str) -> list[list[int]]:
        (tmp_path / "some.txt").write_text(labels)
        settings = ExportSettings(
            model_repository=tmp_path,
            merged=tmp_path / "merged",
            label_sets={"some": tmp_path / "some.txt"},
        )
        source = read_source([adapter_path], settings, dynamic_alpha=False)
        assert len(source.templates) == 2
        served = ServedTokenizer.write(
            tiny_base.tokenizer, tmp_path / "tokenizer.json", dynamic_length=True
        )
        images = open_images(str(photos), "--calibration")
        found = calibrate(images, tiny_base, source, served.encode)
        tokenizer: Any = tiny_base.tokenizer
        length = tokenizer.context_length
        rows = [row.tolist() for batch in found.tokens for row in batch]
        assert found.facts()["texts"] == len(rows)
        return [row + [0] * (length - len(row)) for row in rows]

    return call


def test_every_name_of_a_label_calibrates(calibrated: Calibrate, tiny_base: Base) -> None:
    found = calibrated("cat, kitty\nsalt\\, pepper\n")
    names = ("cat", "kitty", "salt, pepper")
    prompts = [f"a {how} of a {name}." for name in names for how in ("photo", "drawing")]
    assert found[10:] == tiny_base.tokenizer(prompts).tolist()


def test_texts_that_agreement_is_checked_with_do_not_calibrate(
    calibrated: Calibrate, exported: tuple[Path, list[ExportedRelease]]
) -> None:
    """A release keeps some of what it was checked with, to be checked by again."""
    samples = Samples.load(exported[0] / "repository" / "text_encoder" / "1")
    checked = {tuple(row[row > 0].tolist()) for batch in samples.inputs for row in batch}
    calibrates = {tuple(token for token in row if token) for row in calibrated("cat\n")}
    assert len(checked) >= 3 and not checked & calibrates


def test_a_release_that_loses_points_is_refused(
    exported: tuple[Path, list[ExportedRelease]],
    adapter_path: Path,
    tiny_clip_dir: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluated is the newest release, of 0.8, where torch is at 1, and stays on the CPU, where its
    adapters are.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    base = load_base(tiny_clip_dir)
    adapter = load_adapter(adapter_path)
    data = open_validation(adapter.metadata, f"imagefolder:{photos}", None, "fp32", 0.0)
    assert data is not None
    attach_adapter(base.model, adapter, 1.0)
    crop = MaskCrop.filled_with(base.preprocess["mean"])
    lines: list[str] = []

    def evaluated(max_drop: float) -> Accuracy:
        validation = Validation(data.data, max_drop)
        return validation(
            base,
            1.0,
            load_release(exported[0] / "repository"),
            adapter.metadata.templates,
            crop,
            lines.append,
        ).accuracy

    found = evaluated(100)
    assert any("30 of 30 images by release" in line for line in lines)
    with pytest.raises(RAdapterError, match="or allow more with --max-drop"):
        evaluated(found.drop - 0.01)
    metrics = iter([0.5, float("nan")])
    monkeypatch.setattr(
        "radapter_export.accuracy.evaluate_scored",
        lambda *_, **__: [Scored(a_row(share=next(metrics)), None)],
    )
    with pytest.raises(RAdapterError, match="the encoders lose nan points"):
        evaluated(100)
