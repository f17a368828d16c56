"""Graphs of small models, each made once for as long as what makes it stays the same: torch's
exporter takes seconds, and graphs hold no weights.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry

from radapter_export.graph import Graph, graph_weights, image_graph, patch_graph, text_graph
from radapter_serve.adapter import Adapter
from radapter_serve.clip import tokenizer
from radapter_serve.clip.base import Base
from tests.helpers.shared import shared

ROOT = Path(__file__).parents[2]
MAKERS = (
    "export/radapter_export",
    "radapter_serve/adapter",
    "radapter_serve/clip",
    "radapter_serve/contract",
)
TOOLS = ("onnx", "onnx-ir", "onnxscript", "open_clip_torch", "timm", "torch", "transformers")

_read: dict[Path, Graph] = {}
# The table of operators, which torch's exporter makes anew for every graph, is made once.
_operators = functools.cache(ONNXRegistry.from_torchlib)
ONNXRegistry.from_torchlib = staticmethod(_operators)  # type: ignore[method-assign, assignment]
# And CLIP's vocabulary is written once for each tokenizer, which the tests share.
_clip = functools.lru_cache(maxsize=8)(tokenizer._clip)


@contextmanager
def quick_exports(common: Path) -> Iterator[None]:
    """Within the block `export_release` takes graphs that were made for a model of the same form,
    if there are any, and writes CLIP's vocabulary but once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radapter_serve.clip.tokenizer._clip", _clip)
        for make in (image_graph, patch_graph, text_graph):
            patch.setattr(
                f"radapter_export.release.{make.__name__}",
                functools.partial(graph_of, common, make),
            )
        yield


def graph_of(common: Path, make: Callable[..., Graph], base: Base, *rest: Any) -> Graph:
    """The graph of `make(base, *rest)`, such as `image_graph`, which does not depend on the values
    of weights; `rest` is the way to embed patches, and an adapter or None.
    """
    adapters = [each for each in rest if isinstance(each, Adapter)]
    shapes = [
        (name, tensor.shape)
        for adapter in adapters
        for name, tensor in sorted(adapter.tensors.items())
    ]
    ways = [each for each in rest if isinstance(each, str)]
    form = repr((make.__name__, *_tower(base, make is text_graph), ways, shapes))
    name = f"{make.__name__}-{hashlib.sha256(form.encode()).hexdigest()[:16]}"

    def write(folder: Path) -> None:
        graph = make(base, *rest)
        weights = [
            key
            for key, value in graph.model.graph.initializers.items()
            if value.const_value is None
        ]
        state = base.model.state_dict()
        for adapter in adapters:
            state = graph_weights(state, adapter)
        graph.save(state, folder / "model.onnx")
        torch.save((graph.name, weights, graph.constants), folder / "rest.pt")

    folder = shared(_cache_folder(common), name, write)
    if folder not in _read:
        model_name, weights, constants = torch.load(folder / "rest.pt")
        model = onnx_ir.load(folder / "model.onnx")
        for key in weights:
            model.graph.initializers[key].const_value = None
        _read[folder] = Graph(model_name, model, constants)
    return _read[folder]


def _tower(base: Base, text: bool) -> tuple[Any, ...]:
    """All that one of a base's two graphs depends on; two models may have one tower in common."""
    other = "vision_cfg" if text else "text_cfg"
    config = {name: value for name, value in sorted(base.config.items()) if name != other}
    parts = [
        (name, part) for name, part in base.model.named_children() if (name == "visual") != text
    ]
    scaling = () if text else (base.preprocess["mean"], base.preprocess["std"])
    return config, scaling, parts


@functools.cache
def _cache_folder(common: Path) -> Path:
    """The folder that keeps graphs from one run to the next, while the code and the tools that make
    them are the same. Each environment has a folder of its own: `.ci/run` tests in two at a time,
    whose tools differ.
    """
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for folder in MAKERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    for tool in TOOLS:
        digest.update(f"{tool} {importlib.metadata.version(tool)}".encode())
    place = ROOT / ".pytest_cache" / "graphs" / Path(sys.prefix).name
    folder_of_code = place / digest.hexdigest()[:16]
    with FileLock(common / "graphs.lock"):
        if not folder_of_code.is_dir():
            shutil.rmtree(place, ignore_errors=True)  # of other code
            folder_of_code.mkdir(parents=True)
    return folder_of_code
