"""Every graph through TensorRT's own parser and builder, in its RTX edition, which needs no GPU for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from small_models import FAMILIES, make_base
from torch import Tensor

from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_serve.base import Base, load_base
from radapter_serve.errors import RAdapterError
from radapter_serve.serving.engine import Options, build
from radapter_serve.towers import is_causal

trt = pytest.importorskip("tensorrt_rtx")
LIMITS = {"max_batch_size": 64, "max_length": 77}


def check(graph: Graph, weights: Mapping[str, Tensor], folder: Path, image: int, length: int | None) -> None:
    """Build an engine of a graph, and compare the shapes it takes with those that are served."""
    graph.save(weights, folder / "model.onnx")
    plan, profile = build(trt, folder / "model.onnx", Options(), **LIMITS)
    assert len(plan) > 10_000
    if graph.name == "text_encoder":
        shapes = ((1, 1), (8, 16), (64, 77)) if length is None else tuple((batch, length) for batch in (1, 8, 64))
        assert profile == {"tokens": shapes}
    else:
        assert profile == {"image": tuple((batch, image, image, 3) for batch in (1, 8, 64))}


@pytest.mark.parametrize("name", ["image_encoder", "patch_encoder", "text_encoder"])
def test_the_graphs_of_a_vit_are_built(name: str, graphs: dict[str, Graph], tiny_base: Base, tmp_path: Path) -> None:
    check(graphs[name], tiny_base.model.state_dict(), tmp_path, 32, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_of_every_family_are_built(family: str, tmp_path: Path) -> None:
    base = load_base(make_base(family, tmp_path / "base"))
    graphs = [image_graph(base), text_graph(base)]
    try:
        graphs += [patch_graph(base, way) for way in ("maskclip", "naclip")]
    except RAdapterError as error:
        assert "dense" in str(error)  # not every image tower has patches
    length = None if is_causal(base.model) else base.tokenizer.context_length  # type: ignore[attr-defined]
    pixels = graphs[0].model.graph.inputs[0].shape[1]
    for graph in graphs:
        check(graph, base.model.state_dict(), tmp_path, pixels, length)
