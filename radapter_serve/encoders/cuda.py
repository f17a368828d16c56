"""The GPU through its driver alone, libcuda: neither torch nor a CUDA toolkit is needed, nor
anything else from pip.

TensorRT ends the process where there is no driver, so `find_gpu` comes first.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from radapter_serve.errors import RAdapterError

_DRIVER = "libcuda.so.1"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: TensorRT wants another stream than the default one
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR = 75
_MINOR = 76
_INSTEAD = (
    "an engine is built and run on the GPU that serves it: go on there, or take the ONNX graphs on"
    " this machine: radapter-serve --runtime onnxruntime, or radapter-export --runtime onnxruntime"
)


@dataclass(frozen=True)
class Gpu:
    """The GPU that is used: the first that the driver shows (CUDA_VISIBLE_DEVICES chooses)."""

    name: str
    compute_capability: str  # such as "9.0"


def find_gpu() -> Gpu:
    """The GPU of this machine; raises a `RAdapterError` where there is no driver or no GPU."""
    driver = _load()
    device = _first(driver)
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
        self._driver = _load()
        self._device = _first(self._driver)
        self._memory: list[int] = []
        # The device's primary context, which is that of the CUDA runtime too, and so TensorRT's.
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
        """Address of so many bytes."""
        address = ctypes.c_uint64()
        _check(self._driver, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._memory.append(address.value)
        return address.value

    def upload(self, array: NDArray[np.generic]) -> int:
        """Address of a copy of an array."""
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
        """The array at an address, once all work of the stream is done."""
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
        # Before the array is touched on this side.
        _check(self._driver, "cuStreamSynchronize", stream)


def _load() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise RAdapterError(
            f"no GPU: this machine has no NVIDIA driver ({_DRIVER}); {_INSTEAD}"
        ) from None
    if status := driver.cuInit(ctypes.c_uint(0)):
        raise RAdapterError(f"no GPU: the NVIDIA driver says {_error(driver, status)}; {_INSTEAD}")
    return driver


def _first(driver: ctypes.CDLL) -> ctypes.c_int:
    count = ctypes.c_int()
    device = ctypes.c_int()
    _check(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise RAdapterError(
            f"no GPU: the NVIDIA driver shows none (CUDA_VISIBLE_DEVICES?); {_INSTEAD}"
        )
    _check(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    return device


def _check(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    if status := getattr(driver, function)(*arguments):
        raise RAdapterError(f"the GPU failed: {function} says {_error(driver, status)}")


def _error(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
    return name.value.decode() if name.value else f"error {status}"
