"""An exported encoder in this process, by any of the runtimes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import RUNTIMES, TENSORRT
from radapter_serve.runtimes.graph import Graph


class Encoder:
    """A graph in one runtime, and in no other: a fall-back is an error.

    Args:
        path: `model.onnx`, or `model.plan` for tensorrt.
        runtime: onnxruntime, openvino or tensorrt.
        precision: of the release: fp32, fp16, bf16 or int8. OpenVINO computes in bf16 if it says so
            and the CPU can, else in fp32; the other runtimes compute as the graph is typed.
        threads: how many compute a batch; as many as the runtime likes if None.
        device: number of the GPU; None for the CPU, and for tensorrt, which has its own.
        parameters: of the encoder's config.pbtxt, which say more of how to run it.

    Raises:
        RAdapterError: an unknown runtime, one that is not installed, or one that cannot load the
            file.
    """

    def __init__(
        self,
        path: Path,
        runtime: str = "onnxruntime",
        *,
        precision: str = "fp32",
        threads: int | None = None,
        device: int | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        if runtime not in RUNTIMES:
            raise RAdapterError(f"no runtime {runtime!r}; allowed are {', '.join(RUNTIMES)}")
        given = dict(parameters or {})
        if precision == "bf16":
            given["HINT_BF16"] = "YES"
        name = RUNTIMES[runtime].threads
        if name is not None and threads is not None:
            given[name] = str(threads)
        if runtime == TENSORRT:
            from radapter_serve.runtimes.tensorrt.plan import check_plan

            check_plan(path.parent)
            device = 0
        self._graph = load_graph(path, runtime, given, device=device)

    def __call__(self, *values: NDArray[np.generic]) -> NDArray[np.float32]:
        """One batch of images or tokens to embeddings, float32 [B, D] ([B, g, g, D] of a patch
        encoder).

        Args:
            values: an array for each of the graph's inputs, in their order.
        """
        feed = dict(zip(self._graph.inputs, values, strict=True))
        [found] = self._graph.run(feed, self._graph.outputs[:1])
        return np.asarray(found, dtype=np.float32)


def load_graph(
    path: Path,
    runtime: str,
    parameters: Mapping[str, str],
    *,
    device: int | None = None,
    optimization: int = 0,
) -> Graph:
    """A graph in a runtime, loaded as its config.pbtxt asks for it.

    Args:
        path: of its file.
        runtime: one of `RUNTIMES`.
        parameters: those of the config.
        device: number of the GPU; None for the CPU.
        optimization: as of `radapter_serve.runtimes.onnxruntime.load`; the others have none.

    Raises:
        RAdapterError: the runtime is not installed, or cannot load the file there.
    """
    graph = _loaded(path, runtime, parameters, device, optimization)
    # What was read to be packed is free by now, but the allocator keeps it: up to a copy of all
    # weights. Other systems than Linux with glibc lack the function.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    return graph


def _loaded(
    path: Path,
    runtime: str,
    parameters: Mapping[str, str],
    device: int | None,
    optimization: int,
) -> Graph:
    if runtime == "openvino":
        from radapter_serve.runtimes import openvino

        return openvino.load(path, parameters, device=device)
    if runtime == TENSORRT:
        from radapter_serve.runtimes.tensorrt import loading

        return loading.load(path, device=device)
    from radapter_serve.runtimes import onnxruntime

    return onnxruntime.load(path, parameters, device=device, optimization=optimization)
