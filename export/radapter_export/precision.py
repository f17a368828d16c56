"""Precision as types in the graph: products in 16 bits, and in fp32 what would overflow there.

The rules are those of `torch.autocast`: products and convolutions are computed in the low type;
norms, softmax and sums in fp32; everything else in the widest of its inputs. They know operators,
not architectures. Runtimes do what the graph
says: TensorRT's networks are strongly typed, and the same file gives the same numbers everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from radapter_export.graph import Graph

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT
_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"}
# Squares, sums and exponentials leave the range of fp16.
_FP32_OPS = {
    *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
    *("BatchNormalization", "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal"),
    *("CumSum", "GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1"),
    *("ReduceL2", "ReduceProd", "ReduceLogSumExp"),
}
# They compute nothing, and take values of any type as they come.
_PASSTHROUGH_OPS = {
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad"),
    *("Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


def lower(graph: Graph, precision: str) -> Graph:
    """The same graph in fp16 or bf16; inputs and outputs keep their types, initializers their
    names.
    """
    low = TYPES[precision]
    model = graph.model.clone()
    nodes = list(model.graph)
    fp32_nodes = _fp32_nodes(nodes, low)

    # Keep a weight in the low type wherever some node takes it so: tables and matrices, but no
    # norm's weight. Types are replaced, not changed: clones share them.
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

    # Cast what a node takes to the type that it computes in, each value once.
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
    """The nodes that compute in fp32: those that must, and then, until nothing changes, those
    between them.
    """
    fp32_nodes = {
        node
        for node in nodes
        if node.op_type in _FP32_OPS
        or not any(True for _ in _floats(node))
        or any(value.is_graph_output() for value in node.outputs)
    }
    undecided = [node for node in nodes if node.op_type not in _PRODUCTS and node not in fp32_nodes]
    count = -1
    while count < len(fp32_nodes):
        count = len(fp32_nodes)
        fp32_nodes |= {node for node in undecided if _belongs_to(node, fp32_nodes, low)}
    return fp32_nodes


def _belongs_to(node: ir.Node, fp32_nodes: set[ir.Node], low: ir.DataType) -> bool:
    """True if a node is to be computed in fp32 as one before it is, or as all of those after it
    are.
    """
    for _, value in _floats(node):
        if value.producer() in fp32_nodes or _too_large(value, low):
            return True
    if node.op_type in _PASSTHROUGH_OPS:
        return False
    users = [user for value in node.outputs for user in value.consumers()]
    return all(user in fp32_nodes for user in users)


def _floats(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    for place, value in enumerate(node.inputs):
        if value is not None and value.dtype in (_FLOAT, *TYPES.values()):
            yield place, value


def _too_large(value: ir.Value, low: ir.DataType) -> bool:
    """True for a constant beyond the low type, such as minus infinity's stand-in in a mask."""
    if value.const_value is None:
        return False
    array = value.const_value.numpy()
    with np.errstate(over="ignore"):
        return bool((np.isfinite(array) & ~np.isfinite(array.astype(low.numpy()))).any())
