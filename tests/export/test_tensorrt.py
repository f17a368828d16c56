"""Every graph through the parser and builder of TensorRT's RTX edition, which need no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor

from radapter_export.graph import Graph, graph_weights, image_graph, patch_graph, text_graph
from radapter_export.precision import TYPES, lower, quantize
from radapter_serve.clip.base import Base, load_base
from radapter_serve.encoders.tensorrt import build
from radapter_serve.errors import RAdapterError
from tests.helpers.small_models import FAMILIES, Family, make_base, random_adapter

trt = pytest.importorskip("tensorrt_rtx", reason="pip install -e '.[integrations]'")
pytestmark = pytest.mark.integration
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
FLOATS = ("fp32", *TYPES)  # α as an input has no int8 with fixed ranges
LIMITS: dict[str, Any] = {"max_batch_size": 64, "max_length": 77}


def check(graph: Graph, weights: Mapping[str, Tensor], precision: str, folder: Path) -> None:
    """Build an engine for the shapes that are served."""
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
    [("image_encoder", "int8"), ("patch_encoder", "fp16"), ("text_encoder", "fp32")],
)
def test_the_graphs_of_a_vit_are_built(
    name: str, precision: str, graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path
) -> None:
    check(graphs[name], tiny_base.model.state_dict(), precision, tmp_path)


def test_graphs_that_tensorrt_cannot_read_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match=r"TensorRT \S+ cannot read .*none.onnx: "):
        build(trt, tmp_path / "none.onnx", **LIMITS)
    floats = onnx.helper.make_tensor_value_info("floats", onnx.TensorProto.FLOAT, [-1, 4])
    integers = onnx.helper.make_tensor_value_info("whole", onnx.TensorProto.UINT8, [-1, 4])
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["floats"], ["whole", "scale", "zero"])
    graph = onnx.helper.make_graph([node], "quantized", [floats], [integers])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(RAdapterError, match=r"DynamicQuantizeLinear.*; .*--calibration DATA"):
        build(trt, tmp_path / "model.onnx", **LIMITS)


def test_ctrl_c_ends_a_build(
    graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path, ctrl_c: Callable[[], None]
) -> None:
    graphs["image_encoder"].save(tiny_base.model.state_dict(), tmp_path / "model.onnx")
    lines: list[str] = []
    build(trt, tmp_path / "model.onnx", **LIMITS, progress=lines.append)
    line_count = len(lines)

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            ctrl_c()

    lines.clear()
    with pytest.raises(KeyboardInterrupt):
        build(trt, tmp_path / "model.onnx", **LIMITS, progress=interrupt)
    assert 1 <= len(lines) < line_count


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_of_every_family_are_built(family: str, dynamic: bool, tmp_path: Path) -> None:
    """Each family leaves out the towers that an earlier family has."""
    name = make_base(family, tmp_path / "base")
    base = load_base(name)
    adapter = random_adapter(name, partial=FAMILIES[family].partial) if dynamic else None
    alpha = () if adapter is None else (adapter,)

    def is_first(tower: Callable[[Family], object]) -> bool:
        same = [other for other in FAMILIES if tower(FAMILIES[other]) == tower(FAMILIES[family])]
        return same[0] == family

    graphs = []
    if is_first(lambda f: (f.image, f.config.get("quick_gelu"))):
        graphs.append(image_graph(base, *alpha))
        try:
            ways = ("maskclip", "naclip") if family == "vit" else ("naclip",)
            graphs += [patch_graph(base, way, *alpha) for way in ways]
        except RAdapterError as error:
            assert "dense" in str(error)  # not every image tower has patches
    if is_first(lambda f: (f.text, f.config)):
        graphs.append(text_graph(base, *alpha))
    weights = base.model.state_dict()
    if adapter is not None:
        weights = graph_weights(weights, adapter)
    for graph in graphs:
        for precision in FLOATS if dynamic else PRECISIONS:
            check(graph, weights, precision, tmp_path / precision)
