"""Every graph through TensorRT's own parser and builder, in its RTX edition, which needs no GPU for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from small_models import FAMILIES, make_base
from torch import Tensor

from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_export.precision import PRECISIONS, TYPES, lower
from radapter_export.quantization import quantize
from radapter_serve.base import Base, load_base
from radapter_serve.errors import RAdapterError
from radapter_serve.serving.engine import Options, build

trt = pytest.importorskip("tensorrt_rtx")
LIMITS = {"max_batch_size": 64, "max_length": 77}


def check(graph: Graph, weights: Mapping[str, Tensor], precision: str, folder: Path) -> None:
    """Build an engine of a graph, and compare the shapes it takes with those that are served."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    shape = [dim if isinstance(dim, int) else -1 for dim in graph.model.graph.inputs[0].shape]
    (lower(graph, precision) if precision in TYPES else graph).save(weights, path)
    if precision == "int8":
        random = np.random.default_rng(0)
        tokens = graph.name == "text_encoder"
        batch = [3, *(9 if size < 0 else size for size in shape[1:])]
        quantize(path, [random.integers(0, 256, batch).astype(np.int32 if tokens else np.uint8)])
    plan, profile = build(trt, path, Options(), **LIMITS)
    assert len(plan) > 10_000
    [name] = profile
    for found, (batch, length) in zip(profile[name], ((1, 1), (8, 16), (64, 77)), strict=True):
        assert found == (batch, *(length if size < 0 else size for size in shape[1:]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["image_encoder", "patch_encoder", "text_encoder"])
def test_the_graphs_of_a_vit_are_built(
    name: str, precision: str, graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path
) -> None:
    check(graphs[name], tiny_base.model.state_dict(), precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_of_every_family_are_built(family: str, tmp_path: Path) -> None:
    base = load_base(make_base(family, tmp_path / "base"))
    graphs = [image_graph(base), text_graph(base)]
    try:
        graphs += [patch_graph(base, way) for way in ("maskclip", "naclip")]
    except RAdapterError as error:
        assert "dense" in str(error)  # not every image tower has patches
    for graph in graphs:
        for precision in PRECISIONS:
            check(graph, base.model.state_dict(), precision, tmp_path / precision)
