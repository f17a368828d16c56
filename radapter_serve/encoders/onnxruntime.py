"""Graphs in ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from radapter_serve.encoders.graph import Graph
from radapter_serve.errors import RAdapterError, not_installed, reason
from radapter_serve.release.repository import CUDA_OPTIONS

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# What a run may have before its memory is given back, which makes it somewhat slower: images, and
# tokens of texts, of which CLIP has 77 in the longest. What requests bring together is mostly less.
LARGE_ROWS = 32
LARGE_TOKENS = 16 * 77


def load(
    path: Path,
    parameters: Mapping[str, str] | None = None,
    *,
    device: int | None = None,
    optimization: int = 0,
) -> Graph:
    """Load a graph, and refuse to run it elsewhere than on GPU `device` (None: the CPU).

    `parameters` are as NVIDIA's backend reads them from a config.pbtxt: `intra_op_thread_count`,
    `inter_op_thread_count`, `execution_mode`, `enable_mem_arena`, `enable_mem_pattern` (off unless
    it says 1) and `session.*`; `optimization` is the `level` there: below 0 basic, 0 as ONNX
    Runtime itself, above 0 all.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise not_installed("ONNX Runtime", "server", error) from error
    onnxruntime.disable_telemetry_events()  # a graph tells nobody but its callers
    values = parameters or {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(values.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(values.get("inter_op_thread_count", 0))
    if values.get("execution_mode") == "1":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    if values.get("enable_mem_arena") == "0":
        options.enable_cpu_mem_arena = False
    # A pattern takes another block for each shape on top of what the runs before took; batches have
    # many shapes, and are no faster by it.
    options.enable_mem_pattern = values.get("enable_mem_pattern") == "1"
    if optimization < 0:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if optimization > 0:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for key, value in values.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    providers: list[Any] = [CPU] if device is None else [cuda_provider(device), CPU]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise RAdapterError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {reason(error)}"
        ) from error
    used = session.get_providers()[0]
    if device is not None and used != CUDA:
        raise RAdapterError(
            f"ONNX Runtime uses {used} where GPU {device} was asked for; install onnxruntime-gpu"
            " with CUDA and cuDNN, or set kind: KIND_CPU in the instance_group of the encoders'"
            " config.pbtxt"
        )
    shrinking = onnxruntime.RunOptions()
    shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(feed: Mapping[str, NDArray[Any]], names: Sequence[str]) -> Sequence[NDArray[Any]]:
        # A large run needs more memory between its layers than a usual one, which ONNX Runtime
        # would keep for good.
        is_large = False
        if options.enable_cpu_mem_arena and device is None:
            for array in feed.values():
                if array.ndim > 2:
                    is_large |= array.shape[0] > LARGE_ROWS
                else:
                    is_large |= array.dtype.kind == "i" and array.size > LARGE_TOKENS
        outputs: Sequence[NDArray[Any]] = session.run(
            list(names), dict(feed), shrinking if is_large else None
        )
        return outputs

    return Graph(
        [tensor.name for tensor in session.get_inputs()],
        [tensor.name for tensor in session.get_outputs()],
        run,
    )


def cuda_provider(device: int = 0) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's provider on a GPU, and its options, by which fp32 is fp32.

    The CUDA and cuDNN that came with pip, which lie where no loader looks, are loaded first.
    """
    _load_cuda()
    return CUDA, {"device_id": str(device), **CUDA_OPTIONS}


@functools.cache
def _load_cuda() -> None:
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # what is missing shows when it falls back
        onnxruntime.preload_dlls()
