"""TensorRT and a GPU's driver for a machine without a GPU, strict in the order of calls, shapes and
types.

An engine is the ONNX itself, run by ONNX Runtime on what lies at the addresses it is given. Classes
are named as TensorRT's own; a test compares them with the real ones.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

STREAM = 77
_CDLL = ctypes.CDLL


class Driver:
    """libcuda: memory is this process's own, so an engine can reach it by its address."""

    def __init__(
        self, *, init: int = 0, devices: int = 1, name: str = "NVIDIA H100", capability: str = "9.0"
    ) -> None:
        self.init = init
        self.devices = devices
        self.name = name
        self.capability = capability
        self.memory: dict[int, Any] = {}
        self.contexts = self.streams = 0
        self.budget = 1 << 30

    def cuInit(self, flags: ctypes.c_uint) -> int:
        assert flags.value == 0
        return self.init

    def cuGetErrorName(self, status: ctypes.c_int, name: Any) -> int:
        known = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 100: b"CUDA_ERROR_NO_DEVICE"}
        name._obj.value = known.get(status.value)
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, ordinal: ctypes.c_int) -> int:
        assert ordinal.value < self.devices
        device._obj.value = ordinal.value
        return 0

    def cuDeviceGetName(self, name: Any, size: ctypes.c_int, device: ctypes.c_int) -> int:
        assert len(self.name) < size.value <= len(name)
        name.value = self.name.encode()
        return 0

    def cuDeviceGetAttribute(
        self, value: Any, attribute: ctypes.c_int, device: ctypes.c_int
    ) -> int:
        value._obj.value = int(self.capability.split(".")[{75: 0, 76: 1}[attribute.value]])
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        context._obj.value = 5
        self.contexts += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: ctypes.c_int) -> int:
        self.contexts -= 1
        return 0

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        assert context.value == 5 and self.contexts
        return 0

    def cuStreamCreate(self, stream: Any, flags: ctypes.c_uint) -> int:
        assert flags.value == 1  # not ordered after the default stream
        stream._obj.value = STREAM
        self.streams += 1
        return 0

    def cuStreamDestroy_v2(self, stream: ctypes.c_void_p) -> int:
        assert stream.value == STREAM
        self.streams -= 1
        return 0

    def cuStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        assert stream.value == STREAM
        return 0

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:
        assert size.value > 0
        if size.value > self.budget:
            return 2
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(
        self, target: Any, source: Any, size: Any, stream: ctypes.c_void_p
    ) -> int:
        return self._copy(target.value, source.value, size.value, target.value, stream)

    def cuMemcpyDtoHAsync_v2(
        self, target: Any, source: Any, size: Any, stream: ctypes.c_void_p
    ) -> int:
        return self._copy(target.value, source.value, size.value, source.value, stream)

    def _copy(self, target: int, source: int, size: int, mine: int, stream: ctypes.c_void_p) -> int:
        assert stream.value == STREAM and size <= len(self.memory[mine])
        ctypes.memmove(target, source, size)
        return 0


_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
}


def make_tensorrt(driver: Driver, version: str = "11.4.0.106") -> Any:
    """A module `tensorrt` on a machine with this driver."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    vars(trt).update(
        DataType=enum.Enum("DataType", list(_TYPES)),
        TensorIOMode=enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"]),
        BuilderFlag=enum.Enum("BuilderFlag", ["TF32", "VERSION_COMPATIBLE"]),
        MemoryPoolType=enum.Enum("MemoryPoolType", ["WORKSPACE"]),
        HardwareCompatibilityLevel=enum.Enum("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS"]),
        NetworkDefinitionCreationFlag=enum.IntEnum(
            "NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1}
        ),
    )
    trt.nptype = lambda dtype: _TYPES[dtype.name]
    loggers: list[Any] = []

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None:
            loggers.append(self)

        def log(self, severity: int, message: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        def __init__(self) -> None: ...

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network
            self._errors: list[Any] = []

        def parse_from_file(self, path: str) -> bool:
            try:
                model = onnx.load(path)
            except Exception as error:
                self._errors = [("", "", str(error))]
                return False
            unsupported = [
                node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"
            ]
            self._errors = [(node.op_type, node.name, "unsupported") for node in unsupported]
            self._network._model = model
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            operator, name, description = self._errors[index]
            return SimpleNamespace(
                node_operator=lambda: operator, node_name=lambda: name, desc=lambda: description
            )

    class INetworkDefinition:
        _model: Any

        @property
        def num_inputs(self) -> int:
            return len(self._model.graph.input)

        def get_input(self, index: int) -> Any:
            value = self._model.graph.input[index]
            shape = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
            return SimpleNamespace(name=value.name, shape=tuple(shape))

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
            assert all(1 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
            self._shapes[name] = [list(low), list(usual), list(high)]

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> Any:
            return memoryview(b"measured on " + driver.name.encode())

    class IBuilderConfig:
        progress_monitor: Any = None
        hardware_compatibility_level: Any = trt.HardwareCompatibilityLevel.NONE

        def __init__(self) -> None:
            self._flags = {"TF32"}
            self._cache = None
            self._profiles: list[Any] = []
            self._pools: dict[str, int] = {}

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag.name)

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self._pools[pool.name] = size

        def create_timing_cache(self, content: bytes) -> Any:
            return ITimingCache(content)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if (
                cache._content
                and cache._content != b"measured on " + driver.name.encode()
                and not ignore_mismatch
            ):
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            _require(logger)

        def create_network(self, flags: int) -> Any:
            assert flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            graph = network._model.graph
            [profile] = config._profiles
            assert set(profile._shapes) == {value.name for value in graph.input}
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, 2)
            if not all(monitor.step_complete("Building engine", step) for step in range(2)):
                loggers[0].log(ILogger.ERROR, "cancelled")
                return None
            monitor.phase_finish("Building engine")
            head = {
                "version": version,
                "capability": driver.capability,
                "flags": sorted(config._flags),
                "level": config.hardware_compatibility_level.name,
                "pools": config._pools,
                "cache": bytes(config._cache._content).decode() if config._cache else None,
                "profile": profile._shapes,
            }
            return memoryview(
                json.dumps(head).encode() + b"\n" + network._model.SerializeToString()
            )

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            _require(logger)

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            head, _, model = bytes(plan).partition(b"\n")
            facts = json.loads(head)
            if facts["version"] != version:
                loggers[0].log(
                    ILogger.ERROR,
                    "the engine plan file is not compatible with this version of TensorRT",
                )
                return None
            return ICudaEngine(facts, onnx.load_from_string(model))

    class ICudaEngine:
        def __init__(self, facts: Any, model: Any) -> None:
            self._facts = facts
            self._model = model
            self._values = {
                value.name: value for value in (*model.graph.input, *model.graph.output)
            }
            self._names = list(self._values)

        @property
        def num_io_tensors(self) -> int:
            return len(self._names)

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> Any:
            inputs = [value.name for value in self._model.graph.input]
            return trt.TensorIOMode.INPUT if name in inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(
                self._values[name].type.tensor_type.elem_type
            )
            return next(
                getattr(trt.DataType, key) for key, value in _TYPES.items() if value == dtype
            )

        def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
            assert profile == 0
            return self._facts["profile"][name]

        def create_execution_context(self) -> Any:
            return IExecutionContext(self)

    class IExecutionContext:
        def __init__(self, engine: Any) -> None:
            self._engine = engine
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(engine._model.SerializeToString(), options)
            self._shapes: dict[str, Any] = {}
            self._addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: Any) -> bool:
            low, _, high = self._engine._facts["profile"][name]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> Any:
            dims = self._engine._values[name].type.tensor_type.shape.dim
            batch = next(iter(self._shapes.values()))[0]
            return (batch, *(dim.dim_value for dim in dims[1:]))

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert address in driver.memory
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == STREAM and set(self._addresses) == set(self._engine._names)
            feed = {
                value.name: self._array(value.name, self._shapes[value.name])
                for value in self._session.get_inputs()
            }
            for value, result in zip(
                self._session.get_outputs(), self._session.run(None, feed), strict=True
            ):
                self._array(value.name, self.get_tensor_shape(value.name))[:] = result
            return True

        def _array(self, name: str, shape: Any) -> Any:
            dtype = np.dtype(_TYPES[self._engine.get_tensor_dtype(name).name])
            buffer = driver.memory[self._addresses[name]]
            assert len(buffer) == int(np.prod(shape)) * dtype.itemsize, (
                "memory of another size than the tensor's"
            )
            return np.frombuffer(buffer, dtype).reshape(shape)

    def _require(logger: Any) -> None:
        assert isinstance(logger, ILogger) and logger is loggers[0], (
            "TensorRT ignores all loggers but the first"
        )
        assert driver.init == 0 and driver.devices, "without a GPU TensorRT ends the process"

    classes = (
        ILogger,
        IProgressMonitor,
        OnnxParser,
        INetworkDefinition,
        IOptimizationProfile,
        ITimingCache,
    )
    for kind in (*classes, IBuilderConfig, Builder, Runtime, ICudaEngine, IExecutionContext):
        setattr(trt, kind.__name__, kind)
    return trt


def install(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, version: str | None = "11.4.0.106"
) -> Any:
    """Make this process see a driver (None: none) and a TensorRT of a version (None: none)."""

    def load(name: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(name).startswith(("libcuda.", "libnvinfer.")):
            if driver is None or name != "libcuda.so.1":
                raise OSError(f"{name}: cannot open shared object file")
            return driver
        return _CDLL(name, *arguments, **keywords)

    monkeypatch.setattr(ctypes, "CDLL", load)
    trt = make_tensorrt(driver or Driver(), version) if version else None
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    return trt
