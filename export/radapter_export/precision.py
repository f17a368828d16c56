"""Precision of the graphs: 16 bits as types in the graph, and int8 with ONNX Runtime's quantizer.

As in `torch.autocast`, products and convolutions are computed in the low type; norms, softmax and
sums in fp32; all other operators in the widest type of their inputs.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from radapter_export.checks import Inputs
from radapter_export.graph import EXTERNAL_ABOVE, Graph, size_of
from radapter_export.source import Source, read_image
from radapter_serve.clip.base import Base
from radapter_serve.contract.images import spread
from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.files import digest_of
from radapter_serve.release.release import Quantization

Batches = Sequence[NDArray[np.generic]]
# Inputs for the calibration of int8, evenly spread: this many of the user's images (more of them
# change the ranges little), and this many prompts of the label sets
IMAGES = 128
PROMPTS = 512
_IMAGES_A_BATCH = 8
_TEXTS_A_BATCH = 64
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT
_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"}
# Operators with squares, sums or exponentials, which exceed the range of fp16.
_FP32_OPS = {
    *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
    *("BatchNormalization", "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal"),
    *("CumSum", "GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1"),
    *("ReduceL2", "ReduceProd", "ReduceLogSumExp"),
}
# Operators that compute nothing, and keep the type of their values.
_PASSTHROUGH_OPS = {
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad"),
    *("Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


def lower(graph: Graph, precision: str) -> Graph:
    """Convert a graph to fp16 or bf16, except its inputs and outputs."""
    low = TYPES[precision]
    model = graph.model.clone()
    nodes = list(model.graph)
    fp32_nodes = _fp32_nodes(nodes, low)

    # Store a weight in the low type if any node uses it in that type: tables and matrices, but not
    # the weights of norms. Replace type objects, as clones share them.
    for value in model.graph.initializers.values():
        if value.dtype != _FLOAT or all(node in fp32_nodes for node in value.consumers()):
            continue
        value.type = ir.TensorType(low)
        if value.const_value is not None:
            lowered = value.const_value.numpy().astype(low.numpy())
            value.const_value = ir.tensor(lowered, name=value.name)
    for node in nodes:
        for value in node.outputs:
            if value.dtype == _FLOAT and node not in fp32_nodes:
                value.type = ir.TensorType(low)

    # Cast each input of a node to the type that the node computes in, once for each value and type.
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in nodes:
        kind = _FLOAT if node in fp32_nodes else low
        for place, value in _floats(node):
            if value.dtype == kind:
                continue
            if (value, kind) not in casts:
                cast = ir.node("Cast", [value], {"to": kind})
                output = cast.outputs[0]
                output.name = f"{value.name}_{kind.short_name()}"
                output.dtype = kind
                output.shape = value.shape
                model.graph.insert_before(node, cast)
                casts[value, kind] = output
            node.replace_input_with(place, casts[value, kind])
    return dataclasses.replace(graph, model=model)


def _fp32_nodes(nodes: list[ir.Node], low: ir.DataType) -> set[ir.Node]:
    """Find the nodes that compute in fp32: those that must, and then, repeated until nothing
    changes, nodes that follow one of them, nodes with a constant beyond the low type's range (such
    as the replacement of minus infinity in a mask), and nodes whose results go only to fp32 nodes.
    """
    fp32_nodes = set()
    undecided = []
    for node in nodes:
        is_output = any(value.is_graph_output() for value in node.outputs)
        if node.op_type in _FP32_OPS or is_output or not any(True for _ in _floats(node)):
            fp32_nodes.add(node)
        elif node.op_type not in _PRODUCTS:
            undecided.append(node)

    def too_large(value: ir.Value) -> bool:
        if value.const_value is None:
            return False
        array = value.const_value.numpy()
        with np.errstate(over="ignore"):
            return bool((np.isfinite(array) & ~np.isfinite(array.astype(low.numpy()))).any())

    def belongs(node: ir.Node) -> bool:
        if any(value.producer() in fp32_nodes or too_large(value) for _, value in _floats(node)):
            return True
        users = [user for value in node.outputs for user in value.consumers()]
        return node.op_type not in _PASSTHROUGH_OPS and all(user in fp32_nodes for user in users)

    count = -1
    while count < len(fp32_nodes):
        count = len(fp32_nodes)
        fp32_nodes |= {node for node in undecided if belongs(node)}
    return fp32_nodes


def _floats(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    for place, value in enumerate(node.inputs):
        if value is not None and value.dtype in (_FLOAT, *TYPES.values()):
            yield place, value


def calibrate(
    images: Sequence[Path], base: Base, source: Source, tokenizer: Tokenizer
) -> tuple[dict[str, Batches], Quantization]:
    """Prepare each graph's inputs for the calibration of int8: images, prompts of the label sets,
    and texts that the agreement check does not use; also returns facts for the release.
    """
    turns = {"exif_orientation": source.metadata.source.exif_orientation}
    preprocess = Preprocess.from_dict({**base.preprocess, **turns})
    pixels = []
    for path in spread(images, IMAGES):
        where = f"calibration image {path}"
        pixels.append(read_image(path, where, lambda data: decode_pixels(data, preprocess)))
    prompts = [
        template.replace("{}", name)
        for file in source.label_sets.values()
        for label in file.labels
        for name in split_label(label)
        for template in source.templates
    ]
    unseen = Inputs(base, tokenizer, base.image_size, seed=1)
    texts = [
        *unseen.tokens,
        *(tokenizer(batch) for batch in _batched(spread(prompts, PROMPTS), _TEXTS_A_BATCH)),
    ]
    prepared = [np.stack(batch) for batch in _batched(pixels, _IMAGES_A_BATCH)]
    digest = digest_of(*(batch.tobytes() for batch in (*prepared, *texts)))
    facts = Quantization("static", len(pixels), sum(map(len, texts)), digest)
    return {"image_encoder": prepared, "patch_encoder": prepared, "text_encoder": texts}, facts


def _batched(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    """Passes the batches to the calibration one by one."""

    def __init__(self, name: str, batches: Batches) -> None:
        self._batches = iter(batches)
        self._name = name

    def get_next(self) -> Mapping[str, NDArray[np.generic]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def _fold_transpositions(path: Path, plain: Path) -> tuple[str, list[str]]:
    """Write a graph for the quantizer, from which transpositions of weights would hide that these
    are constants; returns the name of the input and the products of two activations.

    ONNX Runtime's `quant_pre_process` does this, too, but up to version 1.23, the last for Python
    3.10, it reads its result after deleting it.
    """
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(plain)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if size_of(path) > EXTERNAL_ABOVE:
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, f"{plain.name}.data")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(plain, load_external_data=False)
    add_pre_process_metadata(model)  # otherwise the quantizer warns
    onnx.save(model, plain)
    # Products of two activations: queries by keys, and attention by values.
    weights = {initializer.name for initializer in model.graph.initializer}
    of_activations = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] not in weights
    ]
    return model.graph.input[0].name, of_activations


def quantize(path: Path, calibration: Batches = ()) -> int:
    """Quantize an encoder from fp32 to int8 in place, with ONNX Runtime's quantizer; returns the
    size of all written files in bytes.

    With inputs for calibration, the ranges of activations are constants of the graph (static:
    symmetric QuantizeLinear and DequantizeLinear, which TensorRT reads, too). Without them, each
    batch gets its own ranges (dynamic, for CPUs only). Weights get 7 bits (`reduce_range`): CPUs
    without VNNI add products of bytes in 16 bits, which saturate with 8-bit weights. One file would
    then give other numbers there, and the error would exceed that of the lost bit.
    """
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": size_of(path) > EXTERNAL_ABOVE,
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        plain = Path(name, "plain.onnx")
        quantized = Path(name, "quantized", path.name)
        quantized.parent.mkdir()

        input_name, excluded = _fold_transpositions(path, plain)
        if calibration:
            quantize_static(
                str(plain),
                str(quantized),
                _Feeds(input_name, calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                extra_options={
                    "ActivationSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                },
                **common,
            )
        else:
            quantize_dynamic(str(plain), str(quantized), **common)
        for file in quantized.parent.iterdir():
            shutil.copymode(path, file)  # onnx writes weights for their owner alone
        for old in path.parent.glob(f"{path.name}*"):
            old.unlink()
        for file in quantized.parent.iterdir():
            file.rename(path.parent / file.name)
    return size_of(path)
