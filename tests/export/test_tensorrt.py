"""Every graph through TensorRT's own parser and builder, in its RTX edition, which needs no GPU for
that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor

from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_export.precision import TYPES, lower, quantize
from radapter_serve.adapter import load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.encoders.tensorrt import build
from radapter_serve.errors import RAdapterError
from tests.helpers.small_models import FAMILIES, make_base, random_adapter

trt = pytest.importorskip("tensorrt_rtx", reason="pip install -e '.[integrations]'")
pytestmark = pytest.mark.integration
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
FLOATS = ("fp32", *TYPES)  # α as an input has no int8 with fixed ranges
LIMITS: dict[str, Any] = {"max_batch_size": 64, "max_length": 77}


def check(graph: Graph, weights: Mapping[str, Tensor], precision: str, folder: Path) -> None:
    """Build an engine of a graph for the shapes that are served."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    (lower(graph, precision) if precision in TYPES else graph).save(weights, path)
    if precision == "int8":
        random = np.random.default_rng(0)
        [tensor] = graph.model.graph.inputs
        shape = [size if isinstance(size, int) else -1 for size in tensor.shape or ()]
        kind = np.int32 if graph.name == "text_encoder" else np.uint8
        batch = [3, *(9 if size < 0 else size for size in shape[1:])]
        quantize(path, [random.integers(0, 256, batch).astype(kind)])
    assert len(build(trt, path, **LIMITS)) > 10_000


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("image_encoder", precision) for precision in PRECISIONS),
        ("patch_encoder", "fp16"),
        ("text_encoder", "fp32"),
        ("text_encoder", "int8"),
    ],
)
def test_the_graphs_of_a_vit_are_built(
    name: str, precision: str, graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path
) -> None:
    check(graphs[name], tiny_base.model.state_dict(), precision, tmp_path)


@pytest.mark.parametrize(
    ("name", "precision"), [("image_encoder", "fp16"), ("text_encoder", "fp32")]
)
def test_graphs_that_take_alpha_are_built(
    name: str,
    precision: str,
    dynamic_graphs: dict[str, Graph],
    tiny_base: Base,
    adapter_path: Path,
    tmp_path: Path,
) -> None:
    weights = {**tiny_base.model.state_dict(), **load_adapter(adapter_path).tensors}
    check(dynamic_graphs[name], weights, precision, tmp_path)


def test_graphs_that_tensorrt_cannot_read_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match=r"TensorRT \S+ cannot read .*none.onnx: "):
        build(trt, tmp_path / "none.onnx", **LIMITS)
    floats = onnx.helper.make_tensor_value_info("floats", onnx.TensorProto.FLOAT, [-1, 4])
    whole = onnx.helper.make_tensor_value_info("whole", onnx.TensorProto.UINT8, [-1, 4])
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["floats"], ["whole", "scale", "zero"])
    graph = onnx.helper.make_graph([node], "quantized", [floats], [whole])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(RAdapterError, match=r"DynamicQuantizeLinear.*; .*--calibration DATA"):
        build(trt, tmp_path / "model.onnx", **LIMITS)


def test_ctrl_c_ends_a_build(
    graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path, ctrl_c: Callable[[], None]
) -> None:
    graphs["image_encoder"].save(tiny_base.model.state_dict(), tmp_path / "model.onnx")
    lines: list[str] = []
    build(trt, tmp_path / "model.onnx", **LIMITS, progress=lines.append)
    whole = len(lines)

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            ctrl_c()

    lines.clear()
    with pytest.raises(KeyboardInterrupt):
        build(trt, tmp_path / "model.onnx", **LIMITS, progress=interrupt)
    assert 1 <= len(lines) < whole


def image_tower(family: str) -> object:
    return FAMILIES[family].image, FAMILIES[family].config.get("quick_gelu")


def text_tower(family: str) -> object:
    return FAMILIES[family].text, FAMILIES[family].config


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_of_every_family_are_built(family: str, dynamic: bool, tmp_path: Path) -> None:
    """But for towers that a family before it has."""
    name = make_base(family, tmp_path / "base")
    base = load_base(name)
    adapter = random_adapter(name, partial=FAMILIES[family].partial) if dynamic else None
    graphs = []
    if family == next(f for f in FAMILIES if image_tower(f) == image_tower(family)):
        graphs.append(image_graph(base, adapter))
        try:
            ways = ("maskclip", "naclip") if family == "vit" else ("naclip",)
            graphs += [patch_graph(base, way, adapter) for way in ways]
        except RAdapterError as error:
            assert "dense" in str(error)  # not every image tower has patches
    if family == next(f for f in FAMILIES if text_tower(f) == text_tower(family)):
        graphs.append(text_graph(base, adapter))
    weights = {**base.model.state_dict(), **(adapter.tensors if adapter else {})}
    for graph in graphs:
        for precision in FLOATS if dynamic else PRECISIONS:
            check(graph, weights, precision, tmp_path / precision)
