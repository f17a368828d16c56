"""Graphs in TensorRT: engines that were built on this machine."""

from __future__ import annotations

from pathlib import Path

from radapter_serve.encoders.graph import Graph
from radapter_serve.encoders.tensorrt.engine import Engine, import_tensorrt
from radapter_serve.errors import RAdapterError


def load(path: Path, *, device: int | None = 0) -> Graph:
    """Load an engine.

    Args:
        path: `model.plan`.
        device: number of the GPU, None for the CPU; engines are built for GPU 0.

    Raises:
        RAdapterError: TensorRT is not installed, another device was asked for, or the plan is of
            another machine or broken.
    """
    if device != 0:
        where = "the CPU" if device is None else f"GPU {device}"
        raise RAdapterError(
            f"instance on {where}: an engine runs on GPU 0 here; set instance_group kind: KIND_GPU"
        )
    engine = Engine(import_tensorrt(), path.read_bytes())
    return Graph(
        engine.inputs,
        engine.outputs,
        lambda feed, _: [engine(*(feed[name] for name in engine.inputs))],
    )
