"""Precision: types of operators, numbers where 16 bits overflow, int8, and what the task loses."""

from __future__ import annotations

import os
from collections import defaultdict
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

from radapter_export import ExportSettings
from radapter_export.checks import measure, open_validation
from radapter_export.graph import Graph
from radapter_export.precision import calibrate, lower, quantize
from radapter_export.source import read_source
from radapter_serve.adapter import Adapter, attach_adapter, fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.tokenizer import write_tokenizer
from radapter_serve.contract.images import list_images
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import TOLERANCES, Samples
from tests.export.conftest import CLASSES, GRAPHS, Export, Exported

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("precision", LOW)
def test_products_are_low_and_what_overflows_is_fp32(
    graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path, precision: str, name: str
) -> None:
    graph = graphs[name]
    path = tmp_path / "model.onnx"
    low = LOW[precision]
    state = tiny_base.model.state_dict()
    before = {value.name: value.dtype for value in graph.model.graph.initializers.values()}
    lower(graph, precision).save(state, path)
    assert {value.name: value.dtype for value in graph.model.graph.initializers.values()} == before
    onnx.checker.check_model(str(path), full_check=True)

    # The types that each kind of operator gives, as ONNX's own inference finds them.
    model = onnx.load(path)
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds = defaultdict(set)
    for node in inferred.node:
        kinds[node.op_type].add(types[node.output[0]])
    assert kinds["MatMul"] == {low} and kinds["Conv"] <= {low}
    for kind in ("LayerNormalization", "Softmax", "ReduceSum", "Sqrt"):
        assert kinds[kind] == {TensorProto.FLOAT}
    assert model.graph.input[0].type.tensor_type.elem_type in (TensorProto.UINT8, TensorProto.INT32)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT

    # No cast follows another, and weights are kept in the type that they are used in.
    producers = {node.output[0]: node.op_type for node in model.graph.node}
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert "Cast" not in {producers.get(cast.input[0]) for cast in casts}
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {key for key in weights if key in state} == {key for key in before if key in state}
    for key in weights.keys() & state.keys():
        if key.endswith("weight") and state[key].ndim >= 2:
            assert weights[key] == low, key
        if "ln_" in key:
            assert weights[key] == TensorProto.FLOAT, key


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

PRODUCT = """<ir_version: 10, opset_import: ["" : 20]>
product (float[B, 64] x) => (float[B, 2] y) <float[64, 2] weight = {0}> { y = MatMul(x, weight) }"""


def write_graph(path: Path, text: str, precision: str | None, **weights: np.ndarray) -> Path:
    """Write a graph in ONNX's text form, with weights, in a precision."""
    for name, array in weights.items():  # the text has to give each initializer some value
        text = text.replace(f"{name} = {{0}}", f"{name} = {{{', '.join(['0'] * array.size)}}}")
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.BOOL if node.op_type == "Greater" else ir.DataType.FLOAT
    for name in weights:
        model.graph.initializers[name].const_value = None
    graph = Graph("small", model, {})
    if precision is not None:
        graph = lower(graph, precision)
    graph.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    return path


def test_a_norm_written_out_is_right_where_fp16_overflows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gain = random.normal(size=4).astype(np.float32)
    square = random.normal(size=(4, 4)).astype(np.float32) * 300
    weight = random.normal(size=(8, 4)).astype(np.float32) * 4
    path = write_graph(tmp_path / "m.onnx", NORM, "fp16", gain=gain, square=square, weight=weight)
    image = random.integers(0, 256, (5, 8), dtype=np.uint8)
    rounded = [array.astype(np.float16).astype(np.float64) for array in (weight, square)]
    y = image.astype(np.float64) @ rounded[0]
    centred = y - y.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    z = centred / deviation * gain @ rounded[1]
    largest = np.finfo(np.float16).max  # what the test is about
    assert np.abs(centred).max() ** 2 > largest < np.abs(z).max() ** 2
    expected = z / np.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_allclose(EncoderGraph(path)(image), expected, atol=3e-3)


def test_a_mask_beyond_fp16_hides_and_gives_no_nan(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, value = random.normal(size=(2, 4, 4)).astype(np.float32) * 0.01
    path = write_graph(tmp_path / "m.onnx", MASK, "fp16", weight=weight, value=value)
    image = np.array([[1, 2, 200, 3], [255, 255, 255, 255], [9, 8, 7, 6]], np.uint8)
    shares = np.exp(image.astype(np.float64) @ weight) * (image <= 100)
    shares[1] = 1  # all hidden: all alike, where minus infinity would give NaN
    shares = shares / shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(EncoderGraph(path)(image), shares @ value, atol=1e-4)


def test_a_sum_is_right_beyond_fp16_whatever_takes_it(tmp_path: Path) -> None:
    """64 values of some 4,000 each; what divides by their sum and multiplies may be in 16 bits.

    ONNX's own interpreter does in 16 bits what the graph says; ONNX Runtime's CPU takes 32.
    """
    random = np.random.default_rng(0)
    weight = random.uniform(0.3, 0.7, (64, 64)).astype(np.float32)
    value = random.normal(size=(64, 2)).astype(np.float32)
    path = write_graph(tmp_path / "m.onnx", SHARES, "fp16", weight=weight, value=value)
    image = random.integers(100, 150, (5, 64), dtype=np.uint8)
    y = image.astype(np.float64) @ weight
    assert y.max() < np.finfo(np.float16).max < y.sum(-1).min()  # what the test is about
    expected = 2 * (y / y.sum(-1, keepdims=True) @ value)
    outputs: Any = ReferenceEvaluator(onnx.load(path)).run(None, {"image": image})
    np.testing.assert_allclose(outputs[0], expected, atol=2e-3)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_int8_products_are_right_on_every_cpu(tmp_path: Path, static: bool, large: bool) -> None:
    """Pairs of products of 8 bits with 8 bits, all as large as can be, do not fit into the 16 that
    some CPUs add in. A column of a thousandth of the other's size would be nothing in steps of the
    other's.
    """
    weight = np.random.default_rng(0).uniform(0.5, 1, (64, 2)).astype(np.float32)
    weight[:, 1] *= 1e-3
    x = np.linspace(0.1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    if large:
        weight = np.repeat(np.array([[1, 0.5]], np.float32), 64, axis=0)
        x = np.linspace(0.9, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    path = write_graph(tmp_path / "model.onnx", PRODUCT, None, weight=weight)
    quantize(path, [x] if static else ())
    np.testing.assert_allclose(EncoderGraph(path)(x), x @ weight, rtol=0.02)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


def accuracy_of_torch(base: Base, adapter: Adapter, photos: Path) -> float:
    """Per cent right by open_clip's own code, with the adapter folded in at 0.7."""
    model: Any = load_base(base.name).model
    model.load_state_dict(fold(base.model.state_dict(), adapter, 0.7))
    transform: Any = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    classes = sorted(CLASSES)
    means = []
    hits = []
    with torch.no_grad():
        for name in classes:
            prompts = [template.replace("{}", name) for template in adapter.metadata.templates]
            means.append(model.encode_text(base.tokenizer(prompts), normalize=True).mean(0))
        classifier = torch.nn.functional.normalize(torch.stack(means), dim=-1)
        for path in sorted(photos.rglob("*.png")):
            scores = model.encode_image(transform(Image.open(path))[None]) @ classifier.T
            hits.append(classes[int(scores.argmax())] == path.parent.name)
    return 100 * float(np.mean(hits))


@pytest.mark.parametrize(
    ("precision", "runtime", "static"),
    [
        ("fp16", "onnxruntime", False),
        ("bf16", "openvino", False),
        ("int8", "onnxruntime", False),
        ("int8", "onnxruntime", True),
    ],
)
def test_a_release_says_what_its_precision_costs(
    export: Export,
    adapter_path: Path,
    tiny_base: Base,
    photos: Path,
    tmp_path: Path,
    precision: str,
    runtime: str,
    static: bool,
) -> None:
    pytest.importorskip(runtime)
    data = f"imagefolder:{photos}"
    (release,) = export(
        [0.7],
        precision=precision,
        runtime=runtime,
        calibration=photos if static else None,
        validation=data,
        max_drop=100,
        dense="naclip",
    )
    facts = release.facts
    assert facts["precision"] == precision
    repository = tmp_path / "repository"
    for graph in release.graphs:
        # Coarser than fp32, so it is what it says; and as close as its precision allows.
        assert 1e-6 < graph.agreement.max_error <= TOLERANCES[precision].max_error
        files = {"config.pbtxt", "model.onnx", "samples.npz"}
        assert {path.name for path in (repository / graph.name / "1").iterdir()} == files
    accuracy = facts["accuracy"]
    expected = accuracy_of_torch(tiny_base, load_adapter(adapter_path), photos)
    assert accuracy["torch"] == pytest.approx(expected, abs=0.01)
    assert accuracy["drop"] == pytest.approx(accuracy["torch"] - accuracy["release"])
    assert (accuracy["n"], accuracy["metric"], accuracy["dataset"]) == (30, "acc1", data)
    [warning] = release.warnings
    assert "30 validation images of 5 labels are too few for calibrated" in warning
    assert "confidence" not in facts
    if precision != "int8":
        assert "quantization" not in facts
        return
    # Four products of weights in each of the two layers, and the last projection; the patches'
    # convolution is not.
    graph = onnx.load(repository / "image_encoder" / "1" / "model.onnx").graph
    nodes = [node.op_type for node in graph.node]
    assert nodes.count("QuantizeLinear" if static else "MatMulInteger") == 9
    quantization = facts["quantization"]
    assert quantization["kind"] == ("static" if static else "dynamic")
    if static:
        assert (quantization["images"], quantization["texts"]) == (30, 10)


def test_every_name_of_a_label_calibrates_and_no_text_that_agreement_is_checked_with(
    adapter_path: Path, tiny_base: Base, photos: Path, exported: Exported, tmp_path: Path
) -> None:
    """A release keeps some of the texts that it was checked with, to be checked by again."""
    (tmp_path / "some.txt").write_text("cat, kitty\nsalt\\, pepper\n")
    settings = ExportSettings(label_sets={"some": tmp_path / "some.txt"})
    source = read_source([adapter_path], None, settings)
    tokenizer: Any = tiny_base.tokenizer
    spec = write_tokenizer(tokenizer, tmp_path / "tokenizer.json", dynamic_length=True)
    encode = Tokenizer.load(tmp_path / "tokenizer.json", spec)
    images = list_images(photos).images
    calibration, _ = calibrate(images, tiny_base, source, encode)
    rows = [row for batch in calibration["text_encoder"] for row in batch.tolist()]
    names = ("cat", "kitty", "salt, pepper")
    prompts = [f"a {how} of a {name}." for name in names for how in ("photo", "drawing")]
    assert rows[10:] == encode(prompts).tolist()
    samples = Samples.load(exported[0] / "repository" / "text_encoder" / "1")
    checked = {tuple(row[row > 0].tolist()) for batch in samples.inputs for row in batch}
    calibrating = {tuple(token for token in row if token) for row in rows}
    assert len(checked) >= 3 and not checked & calibrating


def test_a_calibration_image_of_any_size_is_refused_unread(
    adapter_path: Path, tiny_base: Base, tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, 1 << 36)  # which takes no room on the disk
    source = read_source([adapter_path], None, ExportSettings())
    with pytest.raises(RAdapterError, match=r"calibration image .*large\.png: .*at most"):
        calibrate([path], tiny_base, source, tiny_base.tokenizer)  # type: ignore[arg-type]


def test_a_release_that_loses_points_is_refused(
    exported: Exported,
    adapter_path: Path,
    tiny_clip_dir: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newest release, of 0.8, is compared with torch at 1, which stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    base = load_base(tiny_clip_dir)
    adapter = load_adapter(adapter_path)
    data = open_validation(adapter.metadata, f"imagefolder:{photos}", None, "fp32")
    assert data is not None
    attach_adapter(base.model, adapter, 1.0)
    loaded = load_release(exported[0] / "repository")
    lines: list[str] = []

    def drop(max_drop: float) -> float:
        return measure(data, max_drop, base, loaded, lines.append)[0].drop

    points = drop(100)
    assert any("30 of 30 images with release" in line for line in lines)
    with pytest.raises(RAdapterError, match="or allow more with --max-drop"):
        drop(points - 0.01)
    with pytest.raises(RAdapterError, match="and nan are allowed"):
        drop(float("nan"))


def test_weights_of_int8_beside_the_graph_are_readable_as_it_is(
    graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_export.precision.EXTERNAL_ABOVE", 0)
    path = tmp_path / "model.onnx"
    graphs["text_encoder"].save(tiny_base.model.state_dict(), path)
    path.chmod(0o640)
    quantize(path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"model.onnx": 0o640, "model.onnx.data": 0o640}
