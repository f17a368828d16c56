"""Builds engines of TensorRT from ONNX graphs, and runs them on a GPU.

The code calls only the GPU's driver, libcuda: neither torch nor a CUDA toolkit is needed. TensorRT
ends the process if there is no driver, so call `find_gpu` first.

Networks are strongly typed: the ONNX graph sets the precision. Works with TensorRT 10.13 and newer,
including 11. Functions take the module as an argument, because TensorRT's RTX edition builds
without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from radapter_serve.errors import RAdapterError

_DRIVER = "libcuda.so.1"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: TensorRT wants a stream other than the default
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR = 75
_MINOR = 76
_INSTEAD = (
    "an engine is built and run on the GPU that serves it: go on there, or take the ONNX graphs on"
    " this machine: radapter-serve --runtime onnxruntime, or radapter-export --runtime onnxruntime"
)
Shape = tuple[int, ...]
_INSTALL = (
    "run: pip install tensorrt; or, in NVIDIA's Triton container, which has the libraries, pip"
    " install tensorrt-cu13-bindings==VERSION, with the version that `ls"
    " /usr/lib/*/libnvinfer.so.*` shows"
)


@dataclass(frozen=True)
class Gpu:
    """The GPU that is used: the first that the driver shows (CUDA_VISIBLE_DEVICES chooses)."""

    name: str
    compute_capability: str  # such as "9.0"


def find_gpu() -> Gpu:
    """The GPU of this machine; raises a `RAdapterError` if there is no driver or no GPU."""
    driver, device = _open()
    name = ctypes.create_string_buffer(256)
    major = ctypes.c_int()
    minor = ctypes.c_int()
    _check(driver, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    _check(driver, "cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_MAJOR), device)
    _check(driver, "cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_MINOR), device)
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}")


class Stream:
    """A stream of the GPU (its `handle` is a CUstream, an integer) and memory, freed on exit."""

    def __init__(self) -> None:
        self._driver, self._device = _open()
        self._memory: list[int] = []
        # The device's primary context, which the CUDA runtime, and so TensorRT, uses, too.
        context = ctypes.c_void_p()
        stream = ctypes.c_void_p()
        _check(self._driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        _check(self._driver, "cuCtxSetCurrent", context)
        _check(self._driver, "cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self.handle = int(stream.value or 0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        for address in self._memory:
            self._driver.cuMemFree_v2(ctypes.c_uint64(address))
        self._driver.cuStreamDestroy_v2(ctypes.c_void_p(self.handle))
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the GPU; returns their address."""
        address = ctypes.c_uint64()
        _check(self._driver, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._memory.append(address.value)
        return address.value

    def upload(self, array: NDArray[np.generic]) -> int:
        """Copy an array to the GPU; returns its address."""
        address = self.allocate(array.nbytes)
        source = np.ascontiguousarray(array)
        self._copy(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(source.ctypes.data),
            array.nbytes,
        )
        return address

    def download(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Copy the array at an address to the host, after all work of the stream."""
        array = np.empty(shape, dtype)
        self._copy(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            array.nbytes,
        )
        return array

    def _copy(self, function: str, target: Any, source: Any, size: int) -> None:
        stream = ctypes.c_void_p(self.handle)
        _check(self._driver, function, target, source, ctypes.c_size_t(size), stream)
        # Wait for the copy before the host uses the array.
        _check(self._driver, "cuStreamSynchronize", stream)


def _open() -> tuple[ctypes.CDLL, ctypes.c_int]:
    """Load the driver; returns the driver and its first GPU."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise RAdapterError(
            f"no GPU: this machine has no NVIDIA driver ({_DRIVER}); {_INSTEAD}"
        ) from None
    if status := driver.cuInit(ctypes.c_uint(0)):
        raise RAdapterError(f"no GPU: the NVIDIA driver says {_error(driver, status)}; {_INSTEAD}")
    count = ctypes.c_int()
    device = ctypes.c_int()
    _check(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise RAdapterError(
            f"no GPU: the NVIDIA driver shows none (CUDA_VISIBLE_DEVICES?); {_INSTEAD}"
        )
    _check(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    return driver, device


def _check(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    if status := getattr(driver, function)(*arguments):
        raise RAdapterError(f"the GPU failed: {function} says {_error(driver, status)}")


def _error(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
    return name.value.decode() if name.value else f"error {status}"


def import_tensorrt() -> Any:
    """Import `tensorrt`, or only its bindings, which use the system's libraries."""
    problem = "TensorRT is not installed for Python"
    for name in ("tensorrt", "tensorrt_bindings"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                problem = f"TensorRT does not load: {error}"
        except ImportError as error:  # the bindings are there, the libraries are not
            problem = f"TensorRT does not load: {error}"
    raise RAdapterError(f"{problem}; {_INSTALL}")


def build(
    trt: Any,
    onnx: Path,
    *,
    opt_batch_size: int = 8,
    max_batch_size: int,
    opt_length: int = 16,
    max_length: int,
    progress: Callable[[str], None] = lambda line: None,
) -> bytes:
    """Build an engine with the module `tensorrt` or `tensorrt_rtx`; lines of `progress` come from
    other threads.
    """
    log = _log(trt)
    log.clear()
    builder = trt.Builder(log)
    # TensorRT 10 needs the flag; from 11 on, all networks are strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        lines = [f"{of.node_operator()} {of.node_name()}: {of.desc()}".strip() for of in errors]
        why = "; ".join(lines)
        if "DynamicQuantizeLinear" in why:
            why += (
                "; int8 that is quantized as it runs is for CPUs only: export with --precision int8"
                " --calibration DATA"
            )
        raise RAdapterError(f"TensorRT {trt.__version__} cannot read {onnx}: {why}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32; fp16 and bf16 are for speed

    # Set the smallest, usual and largest shape of each input. An open dimension (-1) is the batch
    # if it is the first, else a length.
    profile = builder.create_optimization_profile()
    limits = (
        (1, 1),
        (min(opt_batch_size, max_batch_size), min(opt_length, max_length)),
        (max_batch_size, max_length),
    )
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shapes = []
        for rows, length in limits:
            sizes = [length if axis else rows for axis in range(len(tensor.shape))]
            for axis, size in enumerate(tensor.shape):
                if size >= 0:
                    sizes[axis] = size
            shapes.append(tuple(sizes))
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)

    # Build in another thread: TensorRT drops a KeyboardInterrupt that is raised in its callbacks.
    config.progress_monitor = monitor = _monitor(trt, progress)
    with ThreadPoolExecutor(1) as pool:
        try:
            plan = pool.submit(builder.build_serialized_network, network, config).result()
        except KeyboardInterrupt:
            monitor.interrupted = True
            raise
    if plan is None:
        raise RAdapterError(f"TensorRT {trt.__version__} cannot build {onnx}: {log.summary()}")
    return bytes(plan)


class TensorRTEngine:
    """An engine of `build` in this process, called with the graph's inputs in order."""

    def __init__(self, trt: Any, plan: bytes) -> None:
        self._trt = trt
        log = _log(trt)
        log.clear()
        self._engine = trt.Runtime(log).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RAdapterError(
                f"TensorRT {trt.__version__} does not load the engine: {log.summary()}"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RAdapterError(
                f"TensorRT {trt.__version__} does not run the engine: {log.summary()}"
            )
        names = [
            self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)
        ]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]

    def __call__(self, *inputs: NDArray[np.generic]) -> NDArray[np.float32]:
        """Encode any number of rows to float32 [B, D] ([B, g, g, D] with a patch encoder)."""
        most = self._engine.get_tensor_profile_shape(self.inputs[0], 0)[2][0]
        starts = range(0, len(inputs[0]), most)
        return np.concatenate(
            [self._run([array[start : start + most] for array in inputs]) for start in starts]
        )

    def _run(self, inputs: Sequence[NDArray[np.generic]]) -> NDArray[np.float32]:
        [output] = self.outputs
        with Stream() as stream:
            addresses = {}
            for name, array in zip(self.inputs, inputs, strict=True):
                dtype = self._trt.nptype(self._engine.get_tensor_dtype(name))
                addresses[name] = stream.upload(
                    array.astype(dtype, casting="same_kind", copy=False)
                )
            pairs = zip(self.inputs, inputs, strict=True)
            shape = self.shapes({name: array.shape for name, array in pairs})[output]
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(output)))
            addresses[output] = stream.allocate(int(np.prod(shape)) * dtype.itemsize)
            self.enqueue(addresses, stream.handle)
            return stream.download(addresses[output], shape, dtype).astype(np.float32, copy=False)

    def shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the inputs' shapes, which must fit the engine's profile; returns the outputs'."""
        for name, shape in inputs.items():
            if not self._context.set_input_shape(name, shape):
                limits = self._engine.get_tensor_profile_shape(name, 0)
                raise RAdapterError(
                    f"{name} has the shape {shape}; the engine takes {tuple(limits[0])} to"
                    f" {tuple(limits[2])}"
                )
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self.outputs}

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Start a run on addresses of the GPU, in the shapes that were set, without waiting."""
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(stream):
            raise RAdapterError(f"TensorRT does not run the engine: {_log(self._trt).summary()}")


@functools.cache  # TensorRT keeps the first logger of a process and ignores all others
def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        """Keeps TensorRT's errors, for the messages of our errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._lines.append(message.strip())

        def clear(self) -> None:
            self._lines.clear()

        def summary(self) -> str:
            return "; ".join(self._lines) or "it does not say why"

    return Log()


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Reports phase and step, and stops the build at the next step if `interrupted`."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(f"{phase_name} {step + 1}/{self._steps.get(phase_name, 0)}")
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
