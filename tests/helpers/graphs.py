"""Graphs of small models, each made once: torch's exporter takes seconds for one, and they hold no weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from radapter_export import graph as exporter
from radapter_export.graph import Graph
from radapter_serve.adapter import Adapter
from radapter_serve.clip.base import Base

_made: dict[str, Graph] = {}


def _once(make: Callable[..., Graph]) -> Callable[..., Graph]:
    @functools.wraps(make)
    def remembered(base: Base, *rest: Any) -> Graph:
        shapes = [
            sorted((name, tuple(tensor.shape)) for name, tensor in each.tensors.items())
            if isinstance(each, Adapter)
            else each
            for each in rest
            if each is not None
        ]
        key = repr((make.__name__, base.config, base.preprocess, base.model, shapes))
        if key not in _made:
            _made[key] = make(base, *rest)
        return _made[key]

    return remembered


image_graph = _once(exporter.image_graph)
patch_graph = _once(exporter.patch_graph)
text_graph = _once(exporter.text_graph)


def remember_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let `export_release` take the graphs that an earlier call made for a model of the same form."""
    for make in (image_graph, patch_graph, text_graph):
        patch.setattr(f"radapter_export.release.{make.__name__}", make)
