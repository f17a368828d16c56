"""Graphs in OpenVINO, on the CPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radapter_serve.encoders.graph import Feed, Graph
from radapter_serve.errors import RAdapterError, not_installed

_COPIED = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT")


def load(
    path: Path, parameters: Mapping[str, str] | None = None, *, device: int | None = None
) -> Graph:
    """Compile a graph.

    Args:
        path: `model.onnx`.
        parameters: as NVIDIA's backend reads them from a config.pbtxt: `INFERENCE_NUM_THREADS`,
            `NUM_STREAMS`, `PERFORMANCE_HINT` and `HINT_BF16`. Without the last it computes in fp32,
            where that backend leaves the precision to OpenVINO.
        device: None; OpenVINO runs on the CPU here.

    Raises:
        RAdapterError: OpenVINO is not installed or cannot load the file, or a GPU was asked for.
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

    def run(feed: Feed, names: Any) -> list[Any]:
        found = model(dict(feed))
        return [found[name] for name in names]

    return Graph(
        [tensor.any_name for tensor in model.inputs],
        [tensor.any_name for tensor in model.outputs],
        run,
    )


def import_openvino() -> Any:
    """The package `openvino`, which tells nobody that it is used.

    Raises:
        RAdapterError: it is not installed.
    """
    # Every import reports to its makers; without the package that does it, it keeps quiet.
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

    Raises:
        RAdapterError: it is not installed.
    """
    return import_openvino().Core()


def openvino_properties(parameters: Mapping[str, str] | None) -> dict[str, Any]:
    """How OpenVINO's CPU plugin is to run a graph with these parameters of a config.pbtxt.

    Left alone it computes fp32 in bf16 wherever the CPU can, so the precision is always said. A CPU
    without bf16 computes in fp32 what asks for it.
    """
    given = parameters or {}
    bf16 = given.get("HINT_BF16", "").upper() == "YES"
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # Each encoder's process would pin its first thread to the first core.
        "ENABLE_CPU_PINNING": False,
        **{name: given[name] for name in _COPIED if name in given},
    }
