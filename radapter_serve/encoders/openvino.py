"""Graphs in OpenVINO, on the CPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from radapter_serve.encoders.graph import Graph
from radapter_serve.errors import RAdapterError, not_installed

_COPIED = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT")


def load(
    path: Path, parameters: Mapping[str, str] | None = None, *, device: int | None = None
) -> Graph:
    """Compile a graph for the CPU, the one `device` (None) that OpenVINO has here.

    Of the parameters that NVIDIA's backend reads from a config.pbtxt, it heeds
    `INFERENCE_NUM_THREADS`, `NUM_STREAMS`, `PERFORMANCE_HINT` and `HINT_BF16`. Without the last it
    computes in fp32, where that backend leaves the precision to OpenVINO.
    """
    if device is not None:
        raise RAdapterError(
            f"instance on GPU {device}: OpenVINO runs on the CPU; set instance_group kind: KIND_CPU"
        )
    version = import_openvino().__version__
    try:
        model = openvino_core().compile_model(str(path), "CPU", openvino_properties(parameters))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("Exception from")]
        why = " ".join(lines).strip()
        raise RAdapterError(f"OpenVINO {version} cannot load {path}: {why}") from error

    def run(feed: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        outputs = model(dict(feed))
        return [outputs[name] for name in names]

    return Graph(
        [tensor.any_name for tensor in model.inputs],
        [tensor.any_name for tensor in model.outputs],
        run,
    )


def import_openvino() -> Any:
    """The package `openvino`, without its telemetry."""
    # Each import would report to its makers.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise not_installed("OpenVINO", "openvino", error) from error
    return openvino


@functools.cache
def openvino_core() -> Any:
    """OpenVINO in this process, one for all graphs and to its end.

    Its CPU plugin gives the thread a stack for signals, and puts the one before back when it goes.
    Of two that go in another order the second puts back what the first has freed, and the next
    signal, such as Ctrl-C, is the last.
    """
    return import_openvino().Core()


def openvino_properties(parameters: Mapping[str, str] | None) -> dict[str, Any]:
    """Properties of OpenVINO's CPU plugin for these parameters of a config.pbtxt.

    It would compute fp32 in bf16 wherever the CPU can, so the precision is always given. A CPU
    without bf16 computes in fp32.
    """
    options = parameters or {}
    bf16 = options.get("HINT_BF16", "").upper() == "YES"
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # Each encoder's process would pin its first thread to the first core.
        "ENABLE_CPU_PINNING": False,
        **{name: options[name] for name in _COPIED if name in options},
    }
