"""Triton backend `tensorrt` in Python, for servers without the C++ backend of that name; same
configs, same numbers.

Slower than that one: each batch is copied to the GPU and back, and waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radapter_serve.runtimes.tensorrt.engine import Engine, import_tensorrt
from radapter_serve.triton.graph_model import Graph, GraphModel


class TritonPythonModel(GraphModel):
    """An engine of TensorRT."""

    runtime = "TensorRT"

    def load(
        self,
        path: Path,
        config: Mapping[str, Any],
        parameters: Mapping[str, str],
        device: int | None,
    ) -> Graph:
        if device != 0:
            where = "the CPU" if device is None else f"GPU {device}"
            raise RuntimeError(
                f"instance on {where}: an engine runs on GPU 0 here; set instance_group kind:"
                " KIND_GPU"
            )
        engine = Engine(import_tensorrt(), path.read_bytes())
        return Graph(
            engine.inputs,
            engine.outputs,
            lambda feed, _: [engine(*(feed[name] for name in engine.inputs))],
        )
