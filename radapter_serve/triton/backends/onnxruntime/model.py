"""Triton backend `onnxruntime` in Python, for servers without the C++ backend of that name; same
configs, same numbers.

Of the C++ backend's parameters it knows `intra_op_thread_count`, `inter_op_thread_count`,
`execution_mode`, `enable_mem_arena` and `session.*` entries, and `graph_optimization_level` of the
`optimization` block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from radapter_serve.runtimes.encoder import CUDA, cuda_provider
from radapter_serve.triton.graph_model import Graph, GraphModel

# A server tells nobody but its callers.
ort.disable_telemetry_events()


class TritonPythonModel(GraphModel):
    """A graph in an ONNX Runtime session."""

    runtime = "ONNX Runtime"

    def load(
        self,
        path: Path,
        config: Mapping[str, Any],
        parameters: Mapping[str, str],
        device: int | None,
    ) -> Graph:
        session = ort.InferenceSession(
            str(path), _options(config, parameters), providers=_providers(device)
        )
        used = session.get_providers()[0]
        if device is not None and used != CUDA:
            raise RuntimeError(
                f"instance on GPU {device}: ONNX Runtime fell back to {used} without an error; "
                "install onnxruntime-gpu with CUDA and cuDNN, or set instance_group kind: KIND_CPU"
            )
        inputs, outputs = (
            [tensor.name for tensor in some]
            for some in (session.get_inputs(), session.get_outputs())
        )
        return Graph(inputs, outputs, lambda feed, names: session.run(names, feed))


def _options(config: Mapping[str, Any], parameters: Mapping[str, str]) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if parameters.get("enable_mem_arena") == "0":
        options.enable_cpu_mem_arena = False
    # As the C++ backend has it: below 0 basic, 0 as ONNX Runtime itself (all), above 0 all.
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level:
        basic, all_ = (
            ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        )
        options.graph_optimization_level = basic if level < 0 else all_
    for key, value in parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def _providers(device: int | None) -> list[Any]:
    cpu = ["CPUExecutionProvider"]
    return cpu if device is None else [cuda_provider(device), *cpu]
