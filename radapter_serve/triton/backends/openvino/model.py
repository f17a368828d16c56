"""Triton backend `openvino` in Python, for servers without the C++ backend of that name; same
configs, same numbers.

Of the C++ backend's parameters it knows `INFERENCE_NUM_THREADS`, `NUM_STREAMS`, `PERFORMANCE_HINT`
and `HINT_BF16`. Without the last it computes in fp32, where the C++ backend leaves the precision to
OpenVINO.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radapter_serve.runtimes.encoder import openvino_core, openvino_properties
from radapter_serve.triton.graph_model import Graph, GraphModel

_COPIED = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT")


class TritonPythonModel(GraphModel):
    """A graph compiled by OpenVINO for the CPU."""

    runtime = "OpenVINO"

    def load(
        self,
        path: Path,
        config: Mapping[str, Any],
        parameters: Mapping[str, str],
        device: int | None,
    ) -> Graph:
        if device is not None:
            raise RuntimeError(
                f"instance on GPU {device}: OpenVINO runs on the CPU; set instance_group kind:"
                " KIND_CPU"
            )
        precision = "bf16" if parameters.get("HINT_BF16", "").upper() == "YES" else "fp32"
        given = {name: parameters[name] for name in _COPIED if name in parameters}
        model = openvino_core().compile_model(
            str(path), "CPU", {**openvino_properties(precision), **given}
        )
        inputs, outputs = (
            [tensor.any_name for tensor in some] for some in (model.inputs, model.outputs)
        )

        def run(feed: Mapping[str, Any], names: Any) -> list[Any]:
            found = model(feed)
            return [found[name] for name in names]

        return Graph(inputs, outputs, run)
