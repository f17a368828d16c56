"""A graph in a runtime of this process: ONNX Runtime, OpenVINO or TensorRT."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, check_installed, reason
from radapter_serve.release.repository import CUDA_OPTIONS, TENSORRT

CUDA = "CUDAExecutionProvider"
# What a run may have before its memory is given back, which makes it somewhat slower: images, and
# tokens of texts, of which CLIP has 77 in the longest. What requests bring together is mostly less.
LARGE_ROWS = 32
LARGE_TOKENS = 16 * 77
_OPENVINO_PARAMETERS = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT")


@dataclass(frozen=True)
class Graph:
    """A graph that a runtime has loaded: the names of its inputs, in its order, and of its outputs,
    and what runs it, from inputs by name and names of outputs to these.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Callable[[Mapping[str, NDArray[Any]], Sequence[str]], Sequence[NDArray[Any]]]


def load_graph(
    path: Path,
    runtime: str,
    parameters: Mapping[str, str],
    *,
    device: int | None = None,
) -> Graph:
    """Load a graph into a runtime, as its config.pbtxt asks for it, on GPU `device` (None: the CPU)
    and nowhere else.
    """
    if runtime == "openvino":
        graph = _load_openvino(path, parameters, device)
    elif runtime == TENSORRT:
        from radapter_serve.encoders.tensorrt import Engine, import_tensorrt

        if device != 0:
            where = "the CPU" if device is None else f"GPU {device}"
            raise RAdapterError(
                f"instance on {where}: an engine runs on GPU 0 here; set instance_group kind:"
                " KIND_GPU"
            )
        engine = Engine(import_tensorrt(), path.read_bytes())
        graph = Graph(
            engine.inputs,
            engine.outputs,
            lambda feed, _: [engine(*(feed[name] for name in engine.inputs))],
        )
    else:
        graph = _load_onnxruntime(path, parameters, device)
    # What was read to be packed is free by now, but the allocator keeps it: up to a copy of all
    # weights. Other systems than Linux with glibc lack the function.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    return graph


def _load_onnxruntime(path: Path, parameters: Mapping[str, str], device: int | None) -> Graph:
    """By `intra_op_thread_count` and `session.*`, as NVIDIA's backend reads them."""
    check_installed("onnxruntime", "server")
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # a graph tells nobody but its callers
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    # A pattern takes another block for each shape on top of what the runs before took; batches have
    # many shapes, and are no faster by it.
    options.enable_mem_pattern = False
    for key, value in parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device is not None:
        providers.insert(0, cuda_provider(device))
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
        if device is None:
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


@functools.cache
def cuda_provider(device: int = 0) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's provider on a GPU, and its options, by which fp32 is fp32.

    The CUDA and cuDNN that came with pip, which lie where no loader looks, are loaded first.
    """
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # what is missing shows when it falls back
        onnxruntime.preload_dlls()
    return CUDA, {"device_id": str(device), **CUDA_OPTIONS}


def _load_openvino(path: Path, parameters: Mapping[str, str], device: int | None) -> Graph:
    """By those of the parameters in NVIDIA's backend that `openvino_properties` takes."""
    if device is not None:
        raise RAdapterError(
            f"instance on GPU {device}: OpenVINO runs on the CPU; set instance_group kind: KIND_CPU"
        )
    # Each import would report to its makers.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    check_installed("openvino", "openvino")
    import openvino

    try:
        model = openvino_core().compile_model(str(path), "CPU", openvino_properties(parameters))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("Exception from")]
        why = " ".join(lines).strip()
        raise RAdapterError(f"OpenVINO {openvino.__version__} cannot load {path}: {why}") from error

    def run(feed: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        outputs = model(dict(feed))
        return [outputs[name] for name in names]

    return Graph(
        [tensor.any_name for tensor in model.inputs],
        [tensor.any_name for tensor in model.outputs],
        run,
    )


@functools.cache
def openvino_core() -> Any:
    """OpenVINO in this process, one for all graphs and to its end.

    Its CPU plugin gives the thread a stack for signals, and puts the one before back when it goes.
    Of two that go in another order the second puts back what the first has freed, and the next
    signal, such as Ctrl-C, is the last.
    """
    import openvino

    return openvino.Core()


def openvino_properties(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Properties of OpenVINO's CPU plugin for these parameters of a config.pbtxt.

    It would compute fp32 in bf16 wherever the CPU can, so the precision is always given. A CPU
    without bf16 computes in fp32.
    """
    bf16 = parameters.get("HINT_BF16", "").upper() == "YES"
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # Each encoder's process would pin its first thread to the first core.
        "ENABLE_CPU_PINNING": False,
        **{name: parameters[name] for name in _OPENVINO_PARAMETERS if name in parameters},
    }
