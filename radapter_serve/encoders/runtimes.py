"""Graphs in a runtime of this process: ONNX Runtime, OpenVINO or TensorRT."""

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
from radapter_serve.release.repository import CUDA_OPTIONS, RUNTIMES, SPIN_MICROSECONDS, TENSORRT

CUDA = "CUDAExecutionProvider"
# Sizes above which a run gives its memory back afterwards, which makes it somewhat slower: images,
# and tokens, of which CLIP's longest text has 77. Most batches are smaller.
LARGE_ROWS = 32
LARGE_TOKENS = 16 * 77
_OPENVINO_PARAMETERS = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT")


@dataclass(frozen=True)
class Graph:
    """A graph loaded with a runtime: the names of its inputs and outputs, in order, and a function
    that runs it, from inputs by name and names of outputs to output arrays.
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
    """Load a graph into a runtime, on GPU `device` or, for None, on the CPU."""
    if runtime == "openvino":
        graph = _load_openvino(path, parameters, device)
    elif runtime == TENSORRT:
        from radapter_serve.encoders.tensorrt import TensorRTEngine, import_tensorrt

        if device != 0:
            where = "the CPU" if device is None else f"GPU {device}"
            raise RAdapterError(
                f"instance on {where}: an engine runs on GPU 0 here; set instance_group kind:"
                " KIND_GPU"
            )
        engine = TensorRTEngine(import_tensorrt(), path.read_bytes())
        graph = Graph(
            engine.inputs,
            engine.outputs,
            lambda feed, _: [engine(*(feed[name] for name in engine.inputs))],
        )
    else:
        graph = _load_onnxruntime(path, parameters, device)
    # Give the memory that loading has freed, up to a copy of all weights, back to the system. Only
    # Linux with glibc has the function.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    return graph


def _load_onnxruntime(path: Path, parameters: Mapping[str, str], device: int | None) -> Graph:
    """Load a graph; takes `intra_op_thread_count` and `session.*` as NVIDIA's backend does."""
    check_installed("onnxruntime", "server")
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # no usage data leaves the machine
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    # A memory pattern takes another block for each input shape; batches have many shapes, and are
    # no faster with patterns.
    options.enable_mem_pattern = False
    for key, value in session_options(parameters, onnxruntime.__version__).items():
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
        # ONNX Runtime would keep the memory for a large run's activations for good.
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


def session_options(parameters: Mapping[str, str], version: str) -> dict[str, str]:
    """The `session.*` parameters as a version of ONNX Runtime knows them: it ignores others."""
    options = {key: value for key, value in parameters.items() if key.startswith("session.")}
    spinning = "session.intra_op.allow_spinning"
    if options == {spinning: "0"}:  # as version 1.0.0 exported
        options = dict(RUNTIMES["onnxruntime"].parameters)
    release = tuple(int(part) for part in version.split(".")[:2])
    if SPIN_MICROSECONDS in options and release < (1, 26):
        # Without a limit, waiting threads would take the cores from everything else.
        del options[SPIN_MICROSECONDS]
        options[spinning] = "0"
    return options


@functools.cache
def cuda_provider(device: int = 0) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's provider for a GPU, with options that turn TF32 off, so that fp32 is fp32."""
    import onnxruntime

    # Load the libraries of pip's packages, which the loader would not find.
    with contextlib.redirect_stdout(io.StringIO()):  # a missing library shows as a fall-back
        onnxruntime.preload_dlls()
    return CUDA, {"device_id": str(device), **CUDA_OPTIONS}


def _load_openvino(path: Path, parameters: Mapping[str, str], device: int | None) -> Graph:
    """Load a graph with the parameters of NVIDIA's backend that `openvino_properties` takes."""
    if device is not None:
        raise RAdapterError(
            f"instance on GPU {device}: OpenVINO runs on the CPU; set instance_group kind: KIND_CPU"
        )
    # Otherwise each import would send usage data.
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
    """OpenVINO in this process: one core for all graphs, never freed.

    Its CPU plugin sets a signal stack for the thread, and restores the previous stack when it is
    freed. If two cores are freed in another order, the second restores a stack that the first has
    freed, and the next signal, such as Ctrl-C, kills the process.
    """
    import openvino

    return openvino.Core()


def openvino_properties(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Properties of OpenVINO's CPU plugin for parameters of a config.pbtxt."""
    bf16 = parameters.get("HINT_BF16", "").upper() == "YES"
    return {
        # Otherwise the plugin would compute fp32 in bf16 wherever the CPU can.
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # With pinning, each encoder's process would pin its first thread to the first core.
        "ENABLE_CPU_PINNING": False,
        **{name: parameters[name] for name in _OPENVINO_PARAMETERS if name in parameters},
    }
