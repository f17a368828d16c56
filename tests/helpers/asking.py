"""Start and ask a served model: tensors over gRPC, and callers who ask all the time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import np_to_triton_dtype

from radapter_serve.server.config import Endpoints, ServerConfig
from radapter_serve.server.triton_server import TritonServer

# For tests that start a server or load its Python models.
needs_triton = pytest.mark.skipif(
    int(np.__version__.split(".")[0]) >= 2, reason="Triton's Python models refuse numpy 2"
)


def tritonserver(repository: Path, **settings: Any) -> TritonServer:
    """A server of a repository on free ports, which is not started yet."""
    return TritonServer(ServerConfig(repository, Endpoints.on_free_ports(), **settings))


def connect(server: TritonServer) -> grpc.InferenceServerClient:
    return grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))


def tensor(name: str, value: Any) -> grpc.InferInput:
    """An array as it is, a list (of lists) of texts, or one text or number as a list of one."""
    if not isinstance(value, np.ndarray):
        kind = {int: np.int32, float: np.float32}.get(type(value), object)
        value = np.array(value if isinstance(value, list) else [value], kind)
    result = grpc.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
    result.set_data_from_numpy(value)
    return result


def tensors(**values: Any) -> list[grpc.InferInput]:
    return [tensor(name, value) for name, value in values.items()]


@contextlib.contextmanager
def meanwhile(ask: Callable[[], None]) -> Iterator[None]:
    """Ask again and again in a thread, until the end of the block, and once more then; raises what
    the asking has raised.
    """
    is_over = threading.Event()

    def run() -> None:
        ask()
        while not is_over.wait(0.05):
            ask()

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(run)
        try:
            yield
        finally:
            is_over.set()
        asking.result()
        ask()
