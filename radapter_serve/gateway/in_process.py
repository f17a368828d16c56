"""The way to an engine in this process, in place of Triton."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

from radapter_client import Reply
from radapter_serve.contract.errors import TaskError
from radapter_serve.engine.engine import Engine, NotServed
from radapter_serve.engine.steps import collected
from radapter_serve.gateway.errors import UNKNOWN_MODEL, Refused, from_triton
from radapter_serve.gateway.run import GatewayServer, listen
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import Followed
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.engine_server import EngineServer

T = TypeVar("T")
LOG = logging.getLogger("radapter-gateway")


class InProcess:
    """An `Upstream` that asks an engine.

    Args:
        engine: that answers.
        at_once: requests at the same time, each in a thread of its own, where it waits for others
            to be run with it.
    """

    def __init__(self, engine: Engine, at_once: int) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="request")
        # Of its own, for it must not wait until requests have ended.
        self._facts = ThreadPoolExecutor(1, thread_name_prefix="facts")
        # And this one may wait for an object storage.
        self._indexes = ThreadPoolExecutor(1, thread_name_prefix="indexes")

    async def infer(
        self,
        message: service_pb2.ModelInferRequest,
        timeout: float,
        followed: Followed | None = None,
    ) -> service_pb2.ModelInferResponse:
        gone = threading.Event()
        followed = followed or Followed()
        work = partial(self._infer, message, time.monotonic() + timeout, gone, followed)
        try:
            return await self._run(self._threads, work, message.model_name)
        finally:
            gone.set()  # where nobody waits any more

    async def config(self, model: str, version: str = "") -> model_config_pb2.ModelConfig:
        return await self._run(self._facts, partial(self._engine.config, model, version), model)

    async def versions(self, model: str) -> list[str]:
        found = await self._run(self._facts, self._engine.versions, model)
        return [str(version) for version in found]

    async def ready(self, model: str, version: str = "") -> bool:
        return not version or version in await self.versions(model)

    async def outdated_indexes(self) -> Mapping[str, bool]:
        return await asyncio.get_running_loop().run_in_executor(
            self._indexes, self._engine.outdated_indexes
        )

    async def close(self) -> None:
        for threads in (self._threads, self._facts, self._indexes):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], T], model: str) -> T:
        """What the engine says, whose errors become refusals."""
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except TaskError as error:
            refused = from_triton(grpc.StatusCode[error.status], str(error))
            if refused.status >= 500:
                LOG.warning("%s: %s", model, error)
            raise refused from None
        except NotServed as error:
            raise Refused(404, UNKNOWN_MODEL, str(error)) from None

    def _infer(
        self,
        message: service_pb2.ModelInferRequest,
        deadline: float,
        gone: threading.Event,
        followed: Followed,
    ) -> service_pb2.ModelInferResponse:
        inputs = {
            tensor.name: _array(tensor.datatype, tensor.shape, data)
            for tensor, data in zip(message.inputs, message.raw_input_contents, strict=True)
        }
        with collected(followed.steps):
            reply = self._engine.infer(
                message.model_name,
                message.model_version,
                inputs,
                [output.name for output in message.outputs],
                deadline=deadline,
                cancelled=gone.is_set,
            )
        return _message(message.model_name, reply)


@contextlib.contextmanager
def answering(config: ServerConfig, settings: Settings) -> Iterator[EngineServer]:
    """An engine that answers over HTTP in a thread of this process.

    Args:
        config: what to serve, and how.
        settings: where to answer, and what is allowed.

    Raises:
        RAdapterError: a release that can't be served, or a port that is taken.
    """
    with contextlib.closing(listen(settings, "--http-")) as listener, EngineServer(config) as one:
        gateway = GatewayServer(
            settings, listener, lambda: InProcess(one.engine, settings.max_concurrent)
        )
        thread = threading.Thread(target=gateway.run, name="gateway")
        thread.start()
        try:
            gateway.began.wait(60)
            yield one
        finally:
            gateway.stop()
            thread.join()


def _array(datatype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    if datatype == "BYTES":
        return np.asarray(deserialize_bytes_tensor(data)).reshape(shape)
    return np.frombuffer(data, triton_to_np_dtype(datatype)).reshape(shape)


def _message(model: str, reply: Reply) -> service_pb2.ModelInferResponse:
    answer = service_pb2.ModelInferResponse(model_name=model, model_version=str(reply.version))
    for name, array in reply.outputs.items():
        datatype = np_to_triton_dtype(array.dtype)
        answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if datatype != "BYTES":
            answer.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
        else:
            packed = serialize_byte_tensor(array)
            answer.raw_output_contents.append(packed.item() if packed.size else b"")
    return answer
