"""An exported graph run in this process, by any of the runtimes."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError, reason
from radapter_serve.extras import install_command
from radapter_serve.release.repository import CUDA_OPTIONS
from radapter_serve.runtimes.tensorrt.engine import Engine, import_tensorrt
from radapter_serve.runtimes.tensorrt.plan import check_plan

Feed = Mapping[str, NDArray[Any]]


class Encoder:
    """A graph in one runtime, and in no other: a fall-back is an error.

    Args:
        path: `model.onnx`, or `model.plan` for tensorrt.
        runtime: onnxruntime, openvino or tensorrt.
        precision: of the release: fp32, fp16, bf16 or int8. OpenVINO computes in bf16 if it says so
            and the CPU can, else in fp32; the other runtimes compute as the graph is typed.
        threads: how many compute a batch; as many as the runtime likes if None.
        provider: an execution provider of ONNX Runtime.

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
        provider: str = "CPUExecutionProvider",
    ) -> None:
        if runtime == "onnxruntime":
            self._inputs, self._run = _onnxruntime(path, threads, provider)
        elif runtime == "openvino":
            self._inputs, self._run = _openvino(path, precision, threads)
        elif runtime == "tensorrt":
            self._inputs, self._run = _tensorrt(path)
        else:
            raise RAdapterError(
                f"no runtime {runtime!r}; allowed are onnxruntime, openvino and tensorrt"
            )

    def __call__(self, *values: NDArray[np.generic]) -> NDArray[np.float32]:
        """One batch of images or tokens to embeddings, float32 [B, D] ([B, g, g, D] of a patch
        encoder).

        Args:
            values: an array for each of the graph's inputs, in their order.
        """
        return np.asarray(self._run(dict(zip(self._inputs, values, strict=True))), dtype=np.float32)


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
        raise _missing("OpenVINO", "openvino", error) from error
    return openvino


@functools.cache
def openvino_core() -> Any:
    """OpenVINO in this process, one for all encoders and to its end.

    Its CPU plugin gives the thread a stack for signals, and puts the one before back when it goes.
    Of two that go in another order the second puts back what the first has freed, and the next
    signal, such as Ctrl-C, is the last.

    Raises:
        RAdapterError: it is not installed.
    """
    return import_openvino().Core()


def openvino_properties(precision: str, threads: int | None = None) -> dict[str, Any]:
    """How OpenVINO's CPU plugin is to run a release of some precision.

    Left alone it computes fp32 in bf16 wherever the CPU can, so the precision is always said. A CPU
    without bf16 computes in fp32 what asks for it.
    """
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": (
            False
        ),  # each encoder's process would pin its first thread to the first core
        **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
    }


CUDA = "CUDAExecutionProvider"


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


Loaded = tuple[list[str], Callable[[Feed], NDArray[Any]]]


def _onnxruntime(path: Path, threads: int | None, provider: str) -> Loaded:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("ONNX Runtime", "server", error) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    providers = [cuda_provider() if provider == CUDA else provider]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise RAdapterError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {reason(error)}"
        ) from error
    used = session.get_providers()[0]
    if used != provider:
        raise RAdapterError(
            f"ONNX Runtime uses {used} where {provider} was asked for; install onnxruntime-gpu with"
            " CUDA and cuDNN, or set kind: KIND_CPU in the instance_group of the encoders'"
            " config.pbtxt"
        )
    return [tensor.name for tensor in session.get_inputs()], lambda feed: session.run(
        None, dict(feed)
    )[0]


def _openvino(path: Path, precision: str, threads: int | None) -> Loaded:
    core, version = openvino_core(), import_openvino().__version__
    try:
        model = core.compile_model(str(path), "CPU", openvino_properties(precision, threads))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("Exception from")]
        why = " ".join(lines).strip()
        raise RAdapterError(f"OpenVINO {version} cannot load {path}: {why}") from error
    return [tensor.any_name for tensor in model.inputs], lambda feed: model(dict(feed))[0]


def _tensorrt(path: Path) -> Loaded:
    check_plan(path.parent)
    engine = Engine(import_tensorrt(), path.read_bytes())
    return engine.inputs, lambda feed: engine(*feed.values())


def _missing(name: str, extra: str, error: ImportError) -> RAdapterError:
    return RAdapterError(f"{name} is not installed ({error}); {install_command(extra)}")
